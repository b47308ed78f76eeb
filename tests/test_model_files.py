"""Which files of a folder are the model: transformers decides, and everything that reads one goes by that."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from families import logits, model
from helpers import relative
from safetensors.torch import load_file, save_file
from test_models import REFERENCE, lora, moved
from transformers import AutoModelForCausalLM

import ktmoe
from ktmoe import KTError
from ktmoe.checkpoints import files
from ktmoe.checkpoints.files import find_files
from ktmoe.convert import quantize
from ktmoe.models import attach, moe_layers


INDEX = "model.safetensors.index.json"
RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two models of the same sizes and other weights: each in one file, in shards, and as torch writes them."""
    root = tmp_path_factory.mktemp("sources")
    for name in ("a", "b"):
        made = model()
        g = torch.Generator().manual_seed(ord(name))
        for p in made.parameters():
            p.data += torch.randn(p.shape, generator=g) * 0.05
        made.save_pretrained(root / name / "one")
        made.save_pretrained(root / name / "shards", max_shard_size="100KB")
        tensors = load_file(root / name / "one" / "model.safetensors")
        (root / name / "bin").mkdir()
        (root / name / "bins").mkdir()
        torch.save(tensors, root / name / "bin" / "pytorch_model.bin")
        where = {key: f"pytorch_model-0000{1 + n % 2}-of-00002.bin" for n, key in enumerate(tensors)}
        for file in set(where.values()):
            torch.save({k: t for k, t in tensors.items() if where[k] == file}, root / name / "bins" / file)
        index = {"metadata": {"total_size": 1}, "weight_map": where}
        (root / name / "bins" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        for kind in ("bin", "bins"):
            shutil.copy(root / name / "one" / "config.json", root / name / kind)
    return root


def put(source, folder, pattern="*"):
    for file in source.glob(pattern):
        shutil.copy(file, folder)


def with_variant(source, folder):
    """As `save_pretrained(variant="v")` names them."""
    for file in source.glob("*.safetensors"):
        stem, _, rest = file.name.removesuffix(".safetensors").partition("-")
        shutil.copy(file, folder / f"{stem}.v{'-' if rest else ''}{rest}.safetensors")
    index = source / INDEX
    if index.exists():
        content = index.read_text().replace('"model-', '"model.v-')
        (folder / "model.safetensors.index.v.json").write_text(content)


def explicit(folder, name):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))


def one(s, f):
    put(s / "a/one", f)


def shards(s, f):
    put(s / "a/shards", f)


def one_beside_whole_shards(s, f):
    put(s / "b/shards", f)
    put(s / "a/one", f)


def one_beside_a_stale_index(s, f):
    put(s / "a/one", f)
    put(s / "b/shards", f, INDEX)


def shards_beside_others_that_the_index_does_not_name(s, f):
    put(s / "a/shards", f)
    save_file(load_file(s / "b/one/model.safetensors"), f / "model-00099-of-00099.safetensors", {"format": "pt"})
    save_file(load_file(s / "b/one/model.safetensors"), f / "consolidated.safetensors", {"format": "pt"})


def shards_beside_torch_files(s, f):
    put(s / "b/bin", f)
    put(s / "a/shards", f)


def torch_file(s, f):
    put(s / "a/bin", f)


def torch_shards(s, f):
    put(s / "a/bins", f)


def torch_file_beside_torch_shards(s, f):
    put(s / "b/bins", f)
    put(s / "a/bin", f)


def torch_file_asked_for(s, f):
    put(s / "b/one", f)
    put(s / "a/bin", f)
    return {"use_safetensors": False}


def variant(s, f):
    put(s / "b/one", f)
    with_variant(s / "a/one", f)
    return {"variant": "v"}


def variant_in_shards(s, f):
    put(s / "b/one", f)
    with_variant(s / "a/shards", f)
    return {"variant": "v"}


def variant_that_nobody_asked_for(s, f):
    put(s / "a/shards", f)
    with_variant(s / "b/one", f)


def subfolder(s, f):
    put(s / "b/one", f)
    (f / "inner").mkdir()
    put(s / "a/shards", f / "inner")
    return {"subfolder": "inner"}


def named_by_the_configuration(s, f):
    put(s / "b/one", f)
    shutil.copy(s / "a/one/model.safetensors", f / "other.safetensors")
    explicit(f, "other.safetensors")


def index_named_by_the_configuration(s, f):
    put(s / "b/one", f)
    put(s / "a/shards", f, "*-of-*")
    shutil.copy(s / "a/shards" / INDEX, f / "other.safetensors.index.json")
    explicit(f, "other.safetensors.index.json")


FOLDERS = [
    one,
    shards,
    one_beside_whole_shards,
    one_beside_a_stale_index,
    shards_beside_others_that_the_index_does_not_name,
    shards_beside_torch_files,
    torch_file,
    torch_shards,
    torch_file_beside_torch_shards,
    torch_file_asked_for,
    variant,
    variant_in_shards,
    variant_that_nobody_asked_for,
    subfolder,
    named_by_the_configuration,
    index_named_by_the_configuration,
]
each_folder = pytest.mark.parametrize("made", FOLDERS, ids=lambda made: made.__name__)


@pytest.fixture
def folder(made, sources, tmp_path):
    """A folder of the table, and the arguments that it is loaded with."""
    path = tmp_path / "model"
    path.mkdir()
    return path, made(sources, path) or {}


def stock(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def plain(experts):
    return [p[e].clone() for p in (experts.gate_proj, experts.up_proj, experts.down_proj) for e in range(len(p))]


@each_folder
def test_loads_what_stock_loads(folder):
    path, options = folder
    theirs = stock(path, **options)
    ours = ktmoe.load_model(path, REFERENCE, r=4, **options)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    attached = moe_layers(attach(theirs, REFERENCE, r=4))
    for name, layer in moe_layers(ours).items():
        for mine, other in zip(plain(layer.weights), plain(attached[name].weights), strict=True):
            assert torch.equal(mine, other)


@each_folder
def test_transformers_is_asked(folder, monkeypatch):
    """Where it can be, and its order is known where it cannot."""
    path, options = folder
    found = find_files(path, **options)
    monkeypatch.setattr(transformers.modeling_utils, "_get_resolved_checkpoint_files", None)
    if "transformers_weights" not in found.config:
        assert find_files(path, **options).weights == found.weights
    monkeypatch.undo()
    if RELEASE >= (4, 51):
        monkeypatch.setattr(files, "_in_order", None)
        assert find_files(path, **options) == found


@each_folder
def test_merge_and_quantize_read_the_same(folder, tmp_path, monkeypatch):
    path, options = folder
    if set(options) & {"variant", "use_safetensors"}:
        pytest.skip("neither takes it")
    adapted = moved(attach(stock(path, **options), REFERENCE, lora=lora("q_proj", "experts")))
    adapted.save_pretrained(tmp_path / "adapter")
    place = {"model_options": options} if options else {}
    ktmoe.merge_adapter(path, tmp_path / "adapter", tmp_path / "out", **place)
    assert relative(logits(stock(tmp_path / "out")), logits(adapted)) < 1e-5
    if options:
        return
    monkeypatch.setattr(quantize, "pack", lambda layers, *_: layers)
    ours = {n: m.weights for n, m in moe_layers(ktmoe.load_model(path, REFERENCE, r=4)).items()}
    for name, read in quantize.quantize_model(path, tmp_path / "packed").items():
        for mine, other in zip(plain(read), plain(ours[name]), strict=True):
            assert torch.equal(mine, other)


@each_folder
def test_llamafactory_reads_the_same(folder):
    loading = pytest.importorskip("ktmoe.llamafactory.loading")
    path, options = folder
    if options:
        pytest.skip("LLaMA-Factory has no such argument")
    arguments = SimpleNamespace(model_name_or_path=str(path), cache_dir=None, model_revision="main", hf_hub_token=None)
    assert loading._checkpoint(arguments).source == find_files(path)


def test_a_file_of_torch_before_zip(sources, tmp_path):
    put(sources / "a/bin", tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    with pytest.raises(KTError, match=r"pytorch_model\.bin: damaged, or not .* that can be mapped.*save_pretrained"):
        ktmoe.load_model(tmp_path, REFERENCE, r=4)


def cut(file):
    file.write_bytes(file.read_bytes()[:5000])


def replaced_by_a_pickle(file):
    torch.save({"model": Path("x")}, file)


@pytest.mark.parametrize("damage", [cut, replaced_by_a_pickle])
def test_a_damaged_torch_file(damage, sources, tmp_path):
    put(sources / "a/bin", tmp_path)
    damage(tmp_path / "pytorch_model.bin")
    with pytest.raises(KTError, match=r"pytorch_model\.bin: damaged"):
        ktmoe.load_model(tmp_path, REFERENCE, r=4)


@pytest.fixture
def adapter_in(sources, tmp_path):
    """Puts an adapter into a folder."""
    adapted = moved(attach(stock(sources / "a/one"), REFERENCE, lora=lora("q_proj", "experts")))
    adapted.save_pretrained(tmp_path / "adapter")

    def put_it(path):
        put(tmp_path / "adapter", path, "adapter_*")
        return logits(adapted)

    return put_it


def test_an_adapter_beside_the_model_is_not_left_out(sources, adapter_in, tmp_path):
    """transformers would load it on top of the model, without the experts."""
    path = tmp_path / "model"
    path.mkdir()
    put(sources / "a/one", path)
    adapted = adapter_in(path)
    for read in (
        lambda: ktmoe.load_model(path, REFERENCE, r=4),
        lambda: quantize.quantize_model(path, tmp_path / "out"),
        lambda: ktmoe.merge_adapter(path, tmp_path / "adapter", tmp_path / "out"),
    ):
        with pytest.raises(KTError, match=r"model: holds an adapter.* Move it .*ktmoe\.load_adapter"):
            read()
    assert not (tmp_path / "out").exists()
    ktmoe.merge_adapter(path, path, tmp_path / "out")
    assert relative(logits(stock(tmp_path / "out")), adapted) < 1e-5


def test_an_adapter_in_the_place_of_a_model(adapter_in, tmp_path):
    path = tmp_path / "only"
    path.mkdir()
    adapter_in(path)
    content = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(content | {"base_model_name_or_path": "some/base"}))
    with pytest.raises(KTError, match=r"only: holds an adapter.*that it was trained on \(some/base\)"):
        ktmoe.load_model(path, REFERENCE, r=4)
    with pytest.raises(KTError, match="only: no weights that transformers reads"):
        ktmoe.merge_adapter(path, path, tmp_path / "out")


@pytest.mark.parametrize(
    "leaf", ["experts.2.up_proj.bias", "experts.2.up_proj.lora_A.weight", "experts.gate_up_proj_bias"]
)
def test_a_tensor_of_the_experts_that_they_do_not_have(leaf, sources, tmp_path):
    put(sources / "a/one", tmp_path)
    key = f"model.layers.1.mlp.experts.{leaf}"
    tensors = load_file(tmp_path / "model.safetensors") | {key: torch.ones(64)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(KTError, match=rf"model\.safetensors: {key} is no weight that the routed experts have"):
        ktmoe.load_model(tmp_path, REFERENCE, r=4)


@pytest.mark.parametrize(
    "leaf", ["q_proj.lora_A.weight", "q_proj.lora_A.default.weight", "q_proj.modules_to_save.weight"]
)
def test_lora_inside_the_models_file(leaf, sources, adapter_in, tmp_path):
    """transformers loads the rest, and says so in a report among others."""
    path = tmp_path / "model"
    path.mkdir()
    put(sources / "a/one", path)
    adapter_in(tmp_path)
    key = f"model.layers.1.self_attn.{leaf}"
    save_file(load_file(path / "model.safetensors") | {key: torch.ones(4, 64)}, path / "model.safetensors")
    for read in (
        lambda: ktmoe.load_model(path, REFERENCE, r=4),
        lambda: ktmoe.merge_adapter(path, tmp_path / "adapter", tmp_path / "out"),
    ):
        with pytest.raises(KTError, match=rf"model\.safetensors: {key} is LoRA, .* or save it as an adapter"):
            read()
    assert not (tmp_path / "out").exists()
