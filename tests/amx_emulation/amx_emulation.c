/* Emulates Intel AMX on a CPU without it, so that AMX binaries can be tested there. A test tool: never in production.
 *
 * Preloaded (LD_PRELOAD), it handles SIGILL: decodes the instruction at RIP, carries it out on the registers that the
 * kernel saved and on tile state kept per thread, and moves RIP on. It also answers `syscall(SYS_arch_prctl, ...)` for
 * the permission to use tile data, without which tiles fault as they do on the real thing. Anything that an AMX CPU
 * would refuse, and every other illegal instruction, goes on to the handler that the program set, or kills.
 * On a CPU with AMX it steps aside: no handler, no answers.
 * Emulated: the tile instructions with BF16 and INT8 products, and VPDPBUSD in its VEX form. Intel SDM volume 2.
 *
 * The handler uses no lock, no allocation and no library call but memcpy, memset and system calls.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <errno.h>
#include <immintrin.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define AVX512 __attribute__((target("avx512f"), noinline))

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64 };

/* The 64 bytes of LDTILECFG and STTILECFG. */
struct configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[TILES], no_row_bytes[8];
    uint8_t rows[TILES], no_rows[8];
};

/* What lies outside a tile's configured rows and columns is never seen. Palette 0: not configured.
 * initial-exec: in the thread's static block, so that the first use in a handler allocates nothing. */
static __thread struct {
    struct configuration config;
    uint8_t data[TILES][ROWS][ROW_BYTES];
} tiles __attribute__((tls_model("initial-exec"), aligned(64)));

static int active;                   /* set once, before main: the CPU lacks AMX */
static int permitted;                /* the process asked for tile data */
static unsigned long long emulated;  /* instructions */
static struct sigaction next_action; /* what the program wants done with SIGILL */
static uint32_t ymm_high, zmm_high;  /* offsets in the XSAVE area: bits 128-255 and 256-511 of registers 0-15 */

/* ---- decoding ---- */

struct instruction {
    const uint8_t *end;
    unsigned opcode, prefix; /* prefix: 0 none, 1 66, 2 F3, 3 F2 */
    unsigned wide;           /* VEX.L: 256 bits */
    unsigned reg, vvvv, rm;  /* register numbers; rm only if !memory */
    int memory, sib;
    uint64_t address, stride; /* stride: index << scale, apart from the address */
};

static uint64_t general_register(const ucontext_t *context, unsigned number)
{
    static const uint8_t place[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                      REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return (uint64_t)context->uc_mcontext.gregs[place[number]];
}

/* Reads no byte that the instructions known here do not have. Returns 0 for any other instruction. */
static int decode(const ucontext_t *context, struct instruction *out)
{
    const uint8_t *p = (const uint8_t *)context->uc_mcontext.gregs[REG_RIP];
    if (p[0] != 0xC4 || (p[1] & 0x1F) != 2 || (p[2] & 0x80) != 0)
        return 0;
    if (p[3] != 0x49 && p[3] != 0x4B && p[3] != 0x50 && p[3] != 0x5C && p[3] != 0x5E)
        return 0;
    unsigned r = (~p[1] >> 7 & 1) << 3, x = (~p[1] >> 6 & 1) << 3, b = (~p[1] >> 5 & 1) << 3;
    unsigned mod = p[4] >> 6, rm = p[4] & 7, low = rm; /* low: the base register's low bits */
    *out = (struct instruction){.opcode = p[3], .prefix = p[2] & 3, .wide = p[2] >> 2 & 1, .vvvv = ~p[2] >> 3 & 15,
                                .reg = r | (p[4] >> 3 & 7), .rm = b | rm,
                                .memory = mod != 3, .sib = mod != 3 && rm == 4};
    p += 5;
    if (out->sib) {
        unsigned index = x | (*p >> 3 & 7);
        if (index != 4) /* 4: no index */
            out->stride = general_register(context, index) << (*p >> 6);
        low = *p++ & 7;
    }
    int absolute = mod == 0 && low == 5; /* no base: relative to RIP, or with a SIB byte to nothing */
    if (mod == 1) {
        out->address = (uint64_t)(int64_t)(int8_t)*p++;
    } else if (mod == 2 || absolute) {
        int32_t displacement;
        memcpy(&displacement, p, 4);
        out->address = (uint64_t)(int64_t)displacement;
        p += 4;
    }
    if (out->memory && !absolute)
        out->address += general_register(context, b | low);
    else if (out->memory && !out->sib)
        out->address += (uint64_t)p; /* none of the instructions has an immediate: RIP is here */
    out->end = p;
    return 1;
}

/* ---- tiles ---- */

static int load_configuration(const void *from)
{
    struct configuration c;
    memcpy(&c, from, sizeof c);
    int wrong = c.palette > 1; /* a CPU takes any start_row */
    for (unsigned i = 0; i < sizeof c.reserved; i++)
        wrong |= c.reserved[i];
    for (unsigned t = 0; t < TILES; t++) {
        wrong |= c.no_row_bytes[t] | c.no_rows[t];
        wrong |= c.row_bytes[t] > ROW_BYTES || c.rows[t] > ROWS || !c.row_bytes[t] != !c.rows[t];
    }
    if (c.palette != 0 && wrong)
        return 0;
    memset(&tiles, 0, sizeof tiles);
    tiles.config = c.palette != 0 ? c : tiles.config;
    return 1;
}

static int configured(unsigned tile)
{
    return tile < TILES && tiles.config.palette == 1 && tiles.config.rows[tile] != 0;
}

/* What a CPU demands of a transfer (tried on one with AMX): elements of four bytes, and a row to begin with. */
static int transferable(unsigned tile)
{
    const struct configuration *c = &tiles.config;
    return configured(tile) && c->row_bytes[tile] % 4 == 0 && c->start_row < c->rows[tile];
}

/* Between a tile and memory. From start_row on: it is not 0 if the program resumes a transfer that faulted. */
static void transfer(unsigned tile, uint64_t address, uint64_t stride, int store)
{
    const struct configuration *c = &tiles.config;
    for (unsigned row = c->start_row; row < c->rows[tile]; row++) {
        void *memory = (void *)(address + row * stride), *here = tiles.data[tile][row];
        memcpy(store ? memory : here, store ? here : memory, c->row_bytes[tile]);
    }
    tiles.config.start_row = 0;
}

/* What the CPU demands of the operands of a product: three tiles, M x N += (M x K) (K x N), four bytes an element. */
static int fits(unsigned to, unsigned left, unsigned right)
{
    const struct configuration *c = &tiles.config;
    return configured(to) && configured(left) && configured(right) && to != left && to != right && left != right &&
           c->start_row == 0 && c->row_bytes[to] % 4 == 0 && c->row_bytes[left] % 4 == 0 &&
           c->rows[to] == c->rows[left] && c->row_bytes[to] == c->row_bytes[right] &&
           c->row_bytes[left] / 4 == c->rows[right];
}

/* Even and odd elements are summed apart, by fused multiply-adds over k, then together, then into the destination. */
AVX512 static void product_bf16_rows(unsigned to, unsigned left, unsigned right)
{
    const __m512i odd = _mm512_set1_epi32((int)0xFFFF0000);
    for (unsigned m = 0; m < tiles.config.rows[to]; m++) {
        __m512 sum0 = _mm512_setzero_ps(), sum1 = _mm512_setzero_ps();
        for (unsigned k = 0; k < tiles.config.rows[right]; k++) {
            uint32_t pair;
            memcpy(&pair, &tiles.data[left][m][4 * k], 4);
            __m512i a = _mm512_set1_epi32((int)pair), b = _mm512_load_si512(tiles.data[right][k]);
            sum0 = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                                   _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sum0);
            sum1 = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, odd)),
                                   _mm512_castsi512_ps(_mm512_and_si512(b, odd)), sum1);
        }
        float *row = (float *)tiles.data[to][m];
        _mm512_store_ps(row, _mm512_add_ps(_mm512_load_ps(row), _mm512_add_ps(sum0, sum1)));
    }
}

/* Round to nearest, denormals are zero on both sides; the program's MXCSR is neither read nor changed. */
static void product_bf16(unsigned to, unsigned left, unsigned right)
{
    unsigned saved = _mm_getcsr();
    _mm_setcsr(0x9FC0); /* flush to zero, denormals are zero, all exceptions masked, nearest */
    product_bf16_rows(to, left, right);
    _mm_setcsr(saved);
}

/* Four products of bytes per element and k, summed modulo 2^32. */
AVX512 static void product_int8(unsigned to, unsigned left, unsigned right, int left_signed, int right_signed)
{
    for (unsigned k = 0; k < tiles.config.rows[right]; k++)
        for (unsigned j = 0; j < 4; j++) {
            __m512i b = _mm512_load_si512(tiles.data[right][k]);
            b = _mm512_sll_epi32(b, _mm_cvtsi32_si128((int)(24 - 8 * j)));
            b = right_signed ? _mm512_srai_epi32(b, 24) : _mm512_srli_epi32(b, 24);
            for (unsigned m = 0; m < tiles.config.rows[to]; m++) {
                uint8_t byte = tiles.data[left][m][4 * k + j];
                __m512i a = _mm512_set1_epi32(left_signed ? (int8_t)byte : byte);
                __m512i *row = (__m512i *)tiles.data[to][m];
                _mm512_store_si512(row, _mm512_add_epi32(_mm512_load_si512(row), _mm512_mullo_epi32(a, b)));
            }
        }
}

/* ---- vector registers: in the signal frame's XSAVE area (standard format), behind the FXSAVE image ---- */

enum { XMM = 160, SOFTWARE = 464, IN_USE = 512, ZMM_HIGH = 64 };

static void read_vector(const uint8_t *area, unsigned number, void *out)
{
    memcpy(out, area + XMM + 16 * number, 16);
    memcpy((uint8_t *)out + 16, area + ymm_high + 16 * number, 16);
}

/* A component that the area's header calls unused is all zeros, whatever lies in its memory, and stays so: here zeros
 * give zeros, and what is written to its memory is not restored. */
static int vpdpbusd(ucontext_t *context, const struct instruction *in, const void *memory)
{
    uint8_t *area = (uint8_t *)context->uc_mcontext.fpregs;
    uint32_t magic;
    uint64_t in_use;
    memcpy(&magic, area + SOFTWARE, 4);
    memcpy(&in_use, area + IN_USE, 8);
    if (magic != 0x46505853 || !ymm_high) /* FP_XSTATE_MAGIC1: there is an XSAVE area */
        return 0;
    uint32_t sum[8];
    uint8_t bytes[32]; /* unsigned */
    int8_t other[32] = {0};
    read_vector(area, in->reg, sum);
    read_vector(area, in->vvvv, bytes);
    if (in->memory)
        memcpy(other, memory, in->wide ? 32 : 16);
    else
        read_vector(area, in->rm, other);
    for (unsigned i = 0; i < 32; i++)
        sum[i / 4] += (uint32_t)(bytes[i] * other[i]);
    if (!in->wide)
        memset(sum + 4, 0, 16);
    memcpy(area + XMM + 16 * in->reg, sum, 16);
    memcpy(area + ymm_high + 16 * in->reg, sum + 4, 16);
    if (in_use & ZMM_HIGH)
        memset(area + zmm_high + 32 * in->reg, 0, 32);
    return 1;
}

/* ---- carrying out ---- */

static int execute(ucontext_t *context, const struct instruction *in)
{
    unsigned prefix = in->prefix;
    void *memory = (void *)(in->address + in->stride);
    if (in->opcode == 0x50)
        return prefix == 1 && vpdpbusd(context, in, memory);
    if (in->wide || (in->vvvv != 0 && in->opcode < 0x50))
        return 0;
    if (in->opcode == 0x49 && in->memory && in->reg == 0 && prefix == 0) /* LDTILECFG */
        return load_configuration(memory); /* a CPU asks for the permission when a tile is used */
    if (in->opcode == 0x49 && in->memory && in->reg == 0 && prefix == 1) { /* STTILECFG */
        memcpy(memory, &tiles.config, sizeof tiles.config);
        return 1;
    }
    if (in->opcode == 0x49 && !in->memory && in->reg == 0 && in->rm == 0 && prefix == 0) { /* TILERELEASE */
        memset(&tiles, 0, sizeof tiles);
        return 1;
    }
    if (!permitted || !configured(in->reg))
        return 0;
    if (in->opcode == 0x49 && !in->memory && in->rm == 0 && prefix == 3) { /* TILEZERO */
        memset(tiles.data[in->reg], 0, sizeof tiles.data[in->reg]);
        tiles.config.start_row = 0;
        return 1;
    }
    if (in->opcode == 0x4B && in->sib && prefix != 0) { /* F2 TILELOADD, 66 TILELOADDT1, F3 TILESTORED */
        if (!transferable(in->reg))
            return 0;
        transfer(in->reg, in->address, in->stride, prefix == 2);
        return 1;
    }
    if (in->opcode < 0x50 || in->memory || !fits(in->reg, in->rm, in->vvvv))
        return 0;
    if (in->opcode == 0x5E) /* F2 TDPBSSD, F3 TDPBSUD, 66 TDPBUSD, none TDPBUUD */
        product_int8(in->reg, in->rm, in->vvvv, prefix >= 2, prefix == 3 || prefix == 1);
    else if (prefix == 2) /* TDPBF16PS */
        product_bf16(in->reg, in->rm, in->vvvv);
    return in->opcode == 0x5E || prefix == 2;
}

/* Carries out the instruction at the context's RIP and moves RIP on. Returns 0, and changes nothing, if it cannot. */
EXPORT int amx_emulation_step(void *context)
{
    struct instruction in;
    ucontext_t *c = context;
    if (!decode(c, &in) || !execute(c, &in))
        return 0;
    c->uc_mcontext.gregs[REG_RIP] = (greg_t)in.end;
    __atomic_fetch_add(&emulated, 1, __ATOMIC_RELAXED);
    return 1;
}

/* Instructions emulated so far in this process; 0 on a CPU with AMX. */
EXPORT unsigned long long amx_emulation_count(void)
{
    return __atomic_load_n(&emulated, __ATOMIC_RELAXED);
}

/* ---- in the kernel's place ---- */

static long kernel(long number, const long a[6])
{
    register long r10 __asm__("r10") = a[3], r8 __asm__("r8") = a[4], r9 __asm__("r9") = a[5];
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

/* arch_prctl's questions about features that need a permission: supported (0x1021), permitted (0x1022), ask (0x1023).
 * Feature 17 is the tile configuration, which needs none, 18 the tile data. */
EXPORT long syscall(long number, ...)
{
    long a[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(list, long);
    va_end(list);
    if (active && number == SYS_arch_prctl && a[0] == 0x1023 && a[1] == 18) {
        permitted = 1;
        return 0;
    }
    long result = kernel(number, a);
    if (active && number == SYS_arch_prctl && (a[0] == 0x1021 || a[0] == 0x1022) && result != -EFAULT) {
        uint64_t *features = (uint64_t *)a[1];
        if (result < 0) /* a kernel older than these questions */
            *features = 0;
        *features |= a[0] == 0x1021 || permitted ? 3ULL << 17 : 1ULL << 17;
        return 0;
    }
    if (result < 0 && result >= -4095) {
        errno = (int)-result;
        return -1;
    }
    return result;
}

/* The program's handler of SIGILL (Python's faulthandler sets one) comes after this one. */
EXPORT int sigaction(int number, const struct sigaction *action, struct sigaction *old)
{
    if (!active || number != SIGILL) {
        int (*real)(int, const struct sigaction *, struct sigaction *);
        *(void **)&real = dlsym(RTLD_NEXT, "sigaction");
        return real(number, action, old);
    }
    struct sigaction before = next_action;
    if (action)
        next_action = *action;
    if (old)
        *old = before;
    return 0;
}

static void on_illegal_instruction(int number, siginfo_t *info, void *context)
{
    int sent = info->si_code <= 0; /* by kill or raise: there is no instruction to look at */
    if (!sent && amx_emulation_step(context)) {
        while (amx_emulation_step(context)) /* a signal is dear: neighbours are taken along */
            ;
    } else if (next_action.sa_handler == SIG_DFL || (next_action.sa_handler == SIG_IGN && !sent)) {
        /* The default action: after the return, the instruction, or the signal sent anew, finds no handler. */
        static const uint64_t none[4];
        kernel(SYS_rt_sigaction, (long[6]){SIGILL, (long)none, 0, 8});
        if (sent)
            kernel(SYS_tgkill, (long[6]){kernel(SYS_getpid, (long[6]){0}), kernel(SYS_gettid, (long[6]){0}), SIGILL});
    } else if (next_action.sa_flags & SA_SIGINFO) {
        next_action.sa_sigaction(number, info, context);
    } else if (next_action.sa_handler != SIG_IGN) {
        next_action.sa_handler(number);
    }
}

__attribute__((constructor)) static void start(void)
{
    unsigned a, b, c, d;
    __get_cpuid_count(0xD, 2, &a, &ymm_high, &c, &d);
    __get_cpuid_count(0xD, 6, &a, &zmm_high, &c, &d);
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 1) || !(b >> 16 & 1))
        return; /* the CPU has AMX-TILE, or no AVX512F to emulate it with */
    struct sigaction action = {.sa_sigaction = on_illegal_instruction, .sa_flags = SA_SIGINFO | SA_RESTART};
    active = sigaction(SIGILL, &action, &next_action) == 0;
}
