/* Holds single AMX instructions, native or emulated, to plain C arithmetic: check_instructions NAME SEED.
 *
 * Instructions are written as bytes into an executable page, so that registers and addressing modes can be drawn.
 * Ends with 0 and "ok", or names what is wrong. The last line is the number of emulated instructions. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

enum { NONE, P66, F3, F2 }; /* the prefix within VEX */

static __thread uint64_t state; /* of the random numbers */

static uint32_t draw(uint32_t below)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((state >> 33) % below);
}

static void fail(const char *what, double got, double expected)
{
    printf("%s: got %.9g, expected %.9g\n", what, got, expected);
    fflush(stdout);
    _exit(1);
}

/* ---- code ---- */

static __thread uint8_t *page, *end;

static void emit(int count, const uint8_t *bytes)
{
    memcpy(end, bytes, (size_t)count);
    end += count;
}
#define EMIT(...) emit(sizeof((uint8_t[]){__VA_ARGS__}), (uint8_t[]){__VA_ARGS__})

/* Code that is called with `base` in rdi, rdx, r8 and r13, and `index` in rsi, rcx, r9 and r12. */
static void begin(void)
{
    if (!page) {
        page = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (page == MAP_FAILED)
            fail("executable memory", 0, 1);
    }
    end = page;
    EMIT(0x41, 0x54, 0x41, 0x55, 0x49, 0x89, 0xF4, 0x49, 0x89, 0xFD); /* push r12, r13; mov r12, rsi; mov r13, rdi */
}

static void run(void *base, long index)
{
    EMIT(0x41, 0x5D, 0x41, 0x5C, 0xC3); /* pop r13, r12; ret */
    ((void (*)(void *, long, void *, long, void *, long))(uintptr_t)page)(base, index, base, index, base, index);
}

static const int BASES[] = {7, 2, 8, 13}, INDEXES[] = {6, 1, 9, 12};

/* An instruction with a memory operand `displacement` past base + (index << scale); scale < 0: without index. */
static void with_memory(int opcode, int prefix, int vvvv, int wide, int reg, int scale, int32_t displacement)
{
    int base = BASES[draw(4)], index = scale < 0 ? 4 : INDEXES[draw(4)], mod = base == 13 || displacement ? 2 : 0;
    if (mod && displacement >= -128 && displacement < 128)
        mod = 1;
    EMIT(0xC4, (reg < 8) << 7 | (index < 8) << 6 | (base < 8) << 5 | 2);
    EMIT((~vvvv & 15) << 3 | wide << 2 | prefix, opcode);
    EMIT(mod << 6 | (reg & 7) << 3 | 4, (scale < 0 ? 0 : scale) << 6 | (index & 7) << 3 | (base & 7));
    emit(mod == 2 ? 4 : mod, (uint8_t *)&displacement);
}

static void with_registers(int opcode, int prefix, int vvvv, int wide, int reg, int rm)
{
    EMIT(0xC4, (reg < 8) << 7 | 1 << 6 | (rm < 8) << 5 | 2, (~vvvv & 15) << 3 | wide << 2 | prefix, opcode);
    EMIT(3 << 6 | (reg & 7) << 3 | (rm & 7));
}

/* ---- tiles ---- */

struct configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

static void configure(const struct configuration *c)
{
    int32_t displacement = (int32_t[]){0, 64, -64, 4096, -4096}[draw(5)];
    begin();
    with_memory(0x49, NONE, 0, 0, 0, -1, displacement);
    run((uint8_t *)c - displacement, 0);
}

static void transfer(int opcode, int prefix, int tile, void *memory, long stride)
{
    int scale = (int)draw(4), displacement = (int)draw(3) * 100;
    begin();
    with_memory(opcode, prefix, 0, 0, tile, scale, displacement);
    run((uint8_t *)memory - displacement, stride / (1 << scale));
}

static void load(int tile, const void *memory, long stride)
{
    transfer(0x4B, draw(2) ? F2 : P66, tile, (void *)(uintptr_t)memory, stride); /* TILELOADD or TILELOADDT1 */
}

static void store(int tile, void *memory, long stride)
{
    transfer(0x4B, F3, tile, memory, stride);
}

static void ask_permission(void)
{
    if (syscall(SYS_arch_prctl, 0x1023, 18) != 0)
        fail("arch_prctl(ARCH_REQ_XCOMP_PERM)", 1, 0);
}

static void fill(void *to, size_t size)
{
    for (size_t i = 0; i < size; i++)
        ((uint8_t *)to)[i] = (uint8_t)draw(256);
}

/* A drawn configuration of three different tiles for M x N += (M x K) (K x N), of at most 16 each. */
static void draw_product(struct configuration *c, int tile[3], int m, int k, int n)
{
    memset(c, 0, sizeof *c);
    c->palette = 1;
    tile[0] = (int)draw(8);
    tile[1] = (tile[0] + 1 + (int)draw(3)) % 8;
    tile[2] = (tile[0] + 4 + (int)draw(4)) % 8;
    int rows[] = {m, m, k}, columns[] = {n, k, n};
    for (int i = 0; i < 3; i++) {
        c->rows[tile[i]] = (uint8_t)rows[i];
        c->row_bytes[tile[i]] = (uint16_t)(4 * columns[i]);
    }
    configure(c);
}

enum { STRIDE = 96 };

/* Loads a, b and c, multiplies, stores c; also that memory between the rows stays as it was. */
static void multiply(int opcode, int prefix, const int tile[3], void *c, const void *a, const void *b)
{
    load(tile[0], c, STRIDE);
    load(tile[1], a, STRIDE);
    load(tile[2], b, STRIDE);
    begin();
    with_registers(opcode, prefix, tile[2], 0, tile[0], tile[1]);
    run(NULL, 0);
    store(tile[0], c, STRIDE);
}

static void check_int8(int prefix, int left_signed, int right_signed)
{
    static __thread uint8_t a[16 * STRIDE], b[16 * STRIDE], c[16 * STRIDE], before[16 * STRIDE];
    for (int turn = 0; turn < 200; turn++) {
        struct configuration config;
        int tile[3], m = 1 + (int)draw(16), k = 1 + (int)draw(16), n = 1 + (int)draw(16);
        draw_product(&config, tile, m, k, n);
        fill(a, sizeof a);
        fill(b, sizeof b);
        fill(c, sizeof c);
        if (turn == 0) { /* the largest products, and a sum that wraps */
            memset(a, left_signed ? 0x80 : 0xFF, sizeof a);
            memset(b, right_signed ? 0x80 : 0xFF, sizeof b);
            memset(c, 0x7F, sizeof c);
        }
        memcpy(before, c, sizeof c);
        multiply(0x5E, prefix, tile, c, a, b);
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < STRIDE / 4; j++) {
                uint32_t expected, got;
                memcpy(&expected, &before[i * STRIDE + 4 * j], 4);
                memcpy(&got, &c[i * STRIDE + 4 * j], 4);
                for (int x = 0; i < m && j < n && x < 4 * k; x++) {
                    int left = a[i * STRIDE + x], right = b[x / 4 * STRIDE + 4 * j + x % 4];
                    left = left_signed ? (int8_t)left : left;
                    right = right_signed ? (int8_t)right : right;
                    expected += (uint32_t)(left * right);
                }
                if (got != expected)
                    fail("int8 product", got, expected);
            }
    }
}

static float as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static uint16_t as_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)(bits >> 16);
}

static float flushed(float x)
{
    return fpclassify(x) == FP_SUBNORMAL ? copysignf(0, x) : x;
}

static void check_bf16(void)
{
    static __thread uint8_t a[16 * STRIDE], b[16 * STRIDE], c[16 * STRIDE], before[16 * STRIDE];
    double worst = 0;
    for (int turn = 0; turn < 200; turn++) {
        struct configuration config;
        int tile[3], m = 1 + (int)draw(16), k = 1 + (int)draw(16), n = 1 + (int)draw(16);
        draw_product(&config, tile, m, k, n);
        for (int i = 0; i < 16 * STRIDE; i += 2) {
            uint16_t x = as_bf16(((float)draw(2001) - 1000) * ldexpf(1, (int)draw(9) - 12));
            uint16_t y = as_bf16(((float)draw(2001) - 1000) * ldexpf(1, (int)draw(9) - 12));
            memcpy(a + i, &x, 2);
            memcpy(b + i, &y, 2);
        }
        for (int i = 0; i < 16 * STRIDE; i += 4)
            memcpy(c + i, &(float){(float)draw(1 << 20) / 1000 - 500}, 4);
        memcpy(before, c, sizeof c);
        multiply(0x5C, F3, tile, c, a, b);
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < STRIDE / 4; j++) {
                float start, got;
                memcpy(&start, &before[i * STRIDE + 4 * j], 4);
                memcpy(&got, &c[i * STRIDE + 4 * j], 4);
                double sum = start, size = fabs(start);
                for (int x = 0; i < m && j < n && x < 2 * k; x++) {
                    uint16_t left, right;
                    memcpy(&left, &a[i * STRIDE + 2 * x], 2);
                    memcpy(&right, &b[x / 2 * STRIDE + 4 * j + 2 * (x % 2)], 2);
                    double product = (double)as_float((uint32_t)left << 16) * as_float((uint32_t)right << 16);
                    sum += product;
                    size += fabs(product);
                }
                double error = fabs(got - sum) / (size + 1e-30);
                worst = fmax(worst, error);
                if (!(error <= 0x1p-20)) /* one rounding is 2^-24; most of the 34 cancel out */
                    fail("bf16 product", got, sum);
            }
    }
    printf("largest error: %.2g of the sum of magnitudes\n", worst);
}

/* One element: c + a0 b0 + a1 b1. Denormals count as zero, in and out; infinities and NaN follow IEEE. */
static void check_bf16_extremes(void)
{
    const uint32_t tiny = 0x0001, least = 0x0080, half = 0x3F00, one = 0x3F80; /* as bf16 */
    const uint32_t big = 0x7F00, inf = 0x7F80, nan = 0x7FC0;
    const uint32_t cases[][5] = {
        {tiny, big, one, one, 0},          {one, tiny, 0, 0, 0},          {least, half, 0, 0, 0},
        {least, one, 0, 0, 0},             {0, 0, 0, 0, 0x00000001},      {0, 0, 0, 0, 0x80000001},
        {big, big, 0, 0, 0},               {inf, one, 0, 0, 0x3F800000},  {inf, one, inf, one | 0x8000, 0},
        {inf, 0, 0, 0, 0},                 {nan, one, 0, 0, 0},           {0, 0, 0, 0, 0x7FC00000},
        {least, one, least | 0x8000, half, 0}, {one, one, one, one, 0x4B800000}, {inf, tiny, 0, 0, 0},
    };
    unsigned mxcsr = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(0x7F80); /* toward zero, denormals kept: of no interest to AMX */
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const uint32_t *x = cases[i];
        struct configuration config;
        int tile[3];
        uint32_t a = x[0] | x[2] << 16, b = x[1] | x[3] << 16, c = x[4];
        draw_product(&config, tile, 1, 1, 1);
        multiply(0x5C, F3, tile, &c, &a, &b);
        if (__builtin_ia32_stmxcsr() != 0x7F80)
            fail("MXCSR after TDPBF16PS", __builtin_ia32_stmxcsr(), 0x7F80);
        __builtin_ia32_ldmxcsr(0x1F80);
        float sums[2];
        for (int j = 0; j < 2; j++)
            sums[j] = flushed(flushed(as_float(x[2 * j] << 16)) * flushed(as_float(x[2 * j + 1] << 16)));
        float expected = flushed(flushed(as_float(x[4])) + flushed(sums[0] + sums[1])), got = as_float(c);
        if (!(got == expected || (isnan(got) && isnan(expected))))
            fail("bf16 extremes", got, expected);
        __builtin_ia32_ldmxcsr(0x7F80);
    }
    __builtin_ia32_ldmxcsr(mxcsr);
}

/* Configuration, loads, stores, zeroing, release: through all tiles with drawn sizes and strides. */
static void check_tiles(void)
{
    static __thread uint8_t from[8][16 * 256], to[16 * 256], expected[16 * 256];
    for (int turn = 0; turn < 50; turn++) {
        struct configuration c = {.palette = 1}, stored;
        uint8_t fewest = 16;
        for (int t = 0; t < 8; t++) {
            c.rows[t] = (uint8_t)draw(17);
            c.row_bytes[t] = c.rows[t] ? (uint16_t)(4 * (1 + draw(16))) : 0;
            fewest = c.rows[t] && c.rows[t] < fewest ? c.rows[t] : fewest;
        }
        c.start_row = draw(3) ? 0 : (uint8_t)draw(fewest); /* as after a fault: rows before it are left out */
        configure(&c);
        memset(&stored, 0xAA, sizeof stored);
        begin();
        with_memory(0x49, P66, 0, 0, 0, 0, 0); /* STTILECFG */
        run(&stored, 0);
        if (memcmp(&c, &stored, sizeof c) != 0)
            fail("STTILECFG gives what LDTILECFG took", 0, 1);
        long strides[8];
        int loaded[8] = {0}, first = 8; /* a tile that is not loaded holds zeros */
        for (int t = 0; t < 8; t++) {
            fill(from[t], sizeof from[t]);
            strides[t] = 8 * (long)(8 + draw(24));
            if (c.rows[t] && draw(4)) {
                load(t, from[t], strides[t]);
                loaded[t] = 1;
                first = first < 8 ? first : t;
            }
        }
        if (first == 8)
            continue; /* start_row would hold for what follows */
        int zeroed = (int)draw(9); /* 8: none */
        if (zeroed < 8 && c.rows[zeroed]) {
            begin();
            with_registers(0x49, F2, 0, 0, zeroed, 0);
            run(NULL, 0);
        }
        for (int t = 0; t < 8; t++) {
            if (!c.rows[t])
                continue;
            fill(to, sizeof to);
            memcpy(expected, to, sizeof to);
            long stride = 8 * (long)(8 + draw(24));
            for (int r = 0; r < c.rows[t]; r++)
                for (int b = 0; b < c.row_bytes[t]; b++)
                    if (t == zeroed || !loaded[t] || (t == first && r < c.start_row))
                        expected[r * stride + b] = 0;
                    else
                        expected[r * stride + b] = from[t][r * strides[t] + b];
            store(t, to, stride);
            if (memcmp(to, expected, sizeof to) != 0)
                fail("TILELOADD, TILEZERO, TILESTORED of tile", t, t);
        }
        if (draw(2))
            continue; /* the next configuration clears the tiles too */
        begin();
        with_registers(0x49, NONE, 0, 0, 0, 0); /* TILERELEASE */
        with_memory(0x49, P66, 0, 0, 0, 0, 0);
        run(&stored, 0);
        for (size_t i = 0; i < sizeof stored; i++)
            if (((uint8_t *)&stored)[i])
                fail("configuration after TILERELEASE", ((uint8_t *)&stored)[i], 0);
    }
}

static void check_rip_relative(void)
{
    struct configuration c = {.palette = 1, .rows = {3}, .row_bytes = {12}}, stored;
    begin();
    int32_t displacement = (int32_t)(page + 1024 - (end + 9));
    EMIT(0xC4, 0xE2, 0x78, 0x49, 0x05);
    emit(4, (uint8_t *)&displacement);
    with_memory(0x49, P66, 0, 0, 0, 0, 0);
    memcpy(page + 1024, &c, sizeof c);
    run(&stored, 0);
    if (memcmp(&c, &stored, sizeof c) != 0)
        fail("LDTILECFG [rip + displacement]", 0, 1);
}

/* ---- vectors ---- */

static int (*step)(void *);
static int only_xmm; /* nothing is set above bit 127 */

static void on_trap(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info;
    if (only_xmm) { /* a CPU may then leave bits 128-255 out of the XSAVE area, and say so in its header */
        uint8_t *area = (uint8_t *)((ucontext_t *)context)->uc_mcontext.fpregs;
        memset(area + 576, 0xAA, 256);
        area[512] &= (uint8_t)~4;
    }
    if (!step(context))
        fail("VPDPBUSD was not emulated", 0, 1);
}

/* A CPU may have VPDPBUSD without having AMX: a breakpoint before it hands it to the emulation all the same. */
static void check_vpdpbusd(void)
{
    struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO};
    *(void **)&step = dlsym(RTLD_DEFAULT, "amx_emulation_step");
    if (!step)
        fail("the emulation is preloaded", 0, 1);
    sigaction(SIGTRAP, &action, NULL);
    static struct {
        uint8_t in[16][64], out[16][64], memory[64];
    } x;
    for (int turn = 0; turn < 400; turn++) {
        int wide = (int)draw(2), reg = (int)draw(16), vvvv = (int)draw(16), rm = (int)draw(16), memory = (int)draw(2);
        only_xmm = (int)draw(2);
        fill(&x, sizeof x);
        begin();
        EMIT(0xC5, 0xFC, 0x77); /* vzeroall */
        for (int i = 0; i < 16; i++) {
            int32_t offset = 64 * i;
            if (only_xmm)
                EMIT(0xC5, i < 8 ? 0xFA : 0x7A, 0x6F, 0x87 | (i & 7) << 3); /* vmovdqu xmm_i, [rdi + offset] */
            else
                EMIT(0x62, i < 8 ? 0xF1 : 0x71, 0xFE, 0x48, 0x6F, 0x87 | (i & 7) << 3); /* vmovdqu64 zmm_i */
            emit(4, (uint8_t *)&offset);
        }
        EMIT(0xCC);
        if (memory)
            with_memory(0x50, P66, vvvv, wide, reg, 0, (int32_t)((uint8_t *)x.memory - (uint8_t *)&x));
        else
            with_registers(0x50, P66, vvvv, wide, reg, rm);
        for (int i = 0; i < 16; i++) {
            int32_t offset = (int32_t)((uint8_t *)x.out[i] - (uint8_t *)&x);
            EMIT(0x62, i < 8 ? 0xF1 : 0x71, 0xFE, 0x48, 0x7F, 0x87 | (i & 7) << 3);
            emit(4, (uint8_t *)&offset);
        }
        EMIT(0xC5, 0xF8, 0x77); /* vzeroupper */
        run(&x, 0);
        for (int i = 0; only_xmm && i < 16; i++)
            memset(x.in[i] + 16, 0, 48);
        uint8_t expected[64] = {0};
        for (int i = 0; i < (wide ? 8 : 4); i++) {
            int32_t sum;
            memcpy(&sum, x.in[reg] + 4 * i, 4);
            for (int j = 4 * i; j < 4 * i + 4; j++)
                sum = (int32_t)((uint32_t)sum + (uint32_t)(x.in[vvvv][j] * (int8_t)(memory ? x.memory : x.in[rm])[j]));
            memcpy(expected + 4 * i, &sum, 4);
        }
        for (int i = 0; i < 16; i++)
            if (memcmp(x.out[i], i == reg ? expected : x.in[i], 64) != 0)
                fail("VPDPBUSD: wrong content of register", i, reg);
    }
}

/* ---- faults ---- */

static void tile_zero(void)
{
    begin();
    with_registers(0x49, F2, 0, 0, 0, 0);
    run(NULL, 0);
}

static const struct configuration SQUARE = {.palette = 1, .rows = {4, 4, 4}, .row_bytes = {16, 16, 16}};

static void without_permission(void)
{
    configure(&SQUARE); /* this much is free */
    tile_zero();
}

static void without_configuration(void)
{
    ask_permission();
    tile_zero();
}

static void after_release(void)
{
    ask_permission();
    configure(&SQUARE);
    begin();
    with_registers(0x49, NONE, 0, 0, 0, 0);
    run(NULL, 0);
    tile_zero();
}

static void load_with(uint8_t start_row, uint16_t row_bytes)
{
    static uint8_t memory[4 * STRIDE];
    struct configuration c = SQUARE;
    c.start_row = start_row;
    c.row_bytes[0] = row_bytes;
    ask_permission();
    configure(&c);
    load(0, memory, STRIDE);
}

static void parts_of_elements(void) { load_with(0, 15); }
static void no_row_to_begin_with(void) { load_with(4, 16); }

static void sizes_that_do_not_fit(void)
{
    struct configuration c = SQUARE;
    c.rows[2] = 5;
    ask_permission();
    configure(&c);
    begin();
    with_registers(0x5C, F3, 2, 0, 0, 1);
    run(NULL, 0);
}

static void one_tile_twice(void)
{
    ask_permission();
    configure(&SQUARE);
    begin();
    with_registers(0x5E, F2, 1, 0, 0, 1);
    run(NULL, 0);
}

static void another_instruction(void) { __asm__ volatile("ud2"); }

static void sent(void)
{
    raise(SIGILL);
    usleep(1000);
}

static void check_faults(void)
{
    void (*const faults[])(void) = {without_permission,   without_configuration, after_release,
                                    parts_of_elements,    no_row_to_begin_with,  sizes_that_do_not_fit,
                                    one_tile_twice,       another_instruction,   sent};
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        int status;
        pid_t child = fork();
        if (child == 0) {
            faults[i]();
            _exit(0);
        }
        waitpid(child, &status, 0);
        if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGILL)
            fail("an instruction that a CPU refuses ends by SIGILL: case", (double)i, status);
    }
}

static sigjmp_buf back;

static void jump_back(int number)
{
    siglongjmp(back, number);
}

/* The program's own handler gets what is not AMX, and AMX goes on. */
static void check_handler(void)
{
    struct sigaction action = {.sa_handler = jump_back}, found;
    sigaction(SIGILL, &action, NULL);
    sigaction(SIGILL, NULL, &found);
    if (found.sa_handler != jump_back)
        fail("sigaction gives the handler that was set", 0, 1);
    for (int turn = 0; turn < 2; turn++) {
        if (sigsetjmp(back, 1) == 0) {
            another_instruction();
            fail("ud2 reaches the program's handler", 0, 1);
        }
        check_int8(F2, 1, 1);
    }
}

static void check_permission(void)
{
    uint64_t supported = 0, permitted = 0;
    if (syscall(SYS_arch_prctl, 0x1021, &supported) != 0 || (supported >> 17 & 3) != 3)
        fail("features supported", (double)supported, 3 << 17);
    if (syscall(SYS_arch_prctl, 0x1022, &permitted) != 0 || (permitted >> 17 & 3) != 3)
        fail("features permitted", (double)permitted, 3 << 17);
    if (syscall(SYS_getpid) != getpid() || syscall(SYS_arch_prctl, 0x1023, 63) != -1)
        fail("other system calls go to the kernel", 0, 1);
    void *map = (void *)syscall(SYS_mmap, NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0L);
    if (map == MAP_FAILED || munmap(map, 4096) != 0)
        fail("a system call of six arguments", 0, 1);
}

/* ---- main ---- */

static void tdpbssd(void) { check_int8(F2, 1, 1); }
static void tdpbsud(void) { check_int8(F3, 1, 0); }
static void tdpbusd(void) { check_int8(P66, 0, 1); }
static void tdpbuud(void) { check_int8(NONE, 0, 0); }

static void *thread(void *seed)
{
    state = (uint64_t)(uintptr_t)seed;
    check_tiles();
    check_int8(F3, 1, 0);
    return NULL;
}

/* Tiles are per thread: four threads with configurations of their own do not disturb one another. */
static void check_threads(void)
{
    pthread_t threads[4];
    for (uintptr_t i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, thread, (void *)(i + 1 + draw(1000)));
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
}

int main(int count, char **arguments)
{
    static const struct {
        const char *name;
        void (*check)(void);
    } checks[] = {
        {"tiles", check_tiles},       {"rip-relative", check_rip_relative}, {"tdpbf16ps", check_bf16},
        {"bf16-extremes", check_bf16_extremes}, {"tdpbssd", tdpbssd},       {"tdpbsud", tdpbsud},
        {"tdpbusd", tdpbusd},         {"tdpbuud", tdpbuud},                 {"vpdpbusd", check_vpdpbusd},
        {"permission", check_permission}, {"faults", check_faults},         {"handler", check_handler},
        {"threads", check_threads},
    };
    unsigned long long (*emulated)(void) = NULL;
    *(void **)&emulated = dlsym(RTLD_DEFAULT, "amx_emulation_count");
    for (size_t i = 0; count == 3 && i < sizeof checks / sizeof *checks; i++)
        if (strcmp(arguments[1], checks[i].name) == 0) {
            alarm(20); /* a fault that is met again and again */
            state = strtoull(arguments[2], NULL, 10);
            if (checks[i].check != check_faults) /* its children ask on their own */
                ask_permission();
            checks[i].check();
            printf("ok\n%llu\n", emulated ? emulated() : 0);
            return 0;
        }
    printf("usage: check_instructions NAME SEED\n");
    return 2;
}
