"""Folders, recipes and texts of a stranger: nothing of theirs runs, leads elsewhere or is taken for what it is not.

docs/security.md says which guard each of these tests holds.
"""

import io
import json
import pickle
import shutil
import struct
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mixtura
from mixtura.adapters.attach import load_adapter
from mixtura.benchmarks.gpu import stages
from mixtura.checkpoints.pretrained import load_base
from mixtura.checkpoints.tensors import StoredWeights
from mixtura.config import UserError, recipe_from_dict
from mixtura.data.prepare import load_tokenizer
from mixtura.files import check_inside
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.models.loading import load_model
from mixtura.tasks.classification.classifier import classify
from mixtura.tasks.translation.trained_model import translate
from mixtura.training.saving import load_tensors


class RunsCode:
    """What makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def pickled(canary: Path, *, archive: bool) -> bytes:
    """A checkpoint of torch that runs code when it is unpickled: an archive, as since torch 1.6, or a bare pickle."""
    if not archive:
        return pickle.dumps(RunsCode(canary))
    written = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"model.norm.weight": torch.zeros(2), "evil": RunsCode(canary)}, written)
    return written.getvalue()


@pytest.fixture(scope="module")
def good(tokenizer, tmp_path_factory) -> Path:
    """A mixture of tokens with a tokenizer."""
    folder = tmp_path_factory.mktemp("good")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "hidden_act": "silu"}
    mixture = {"mlp_layer_types": ["mixture_of_tokens"] * 2, "num_experts": 4, "group_size": 4, "alone_top_k": 2}
    tokens = {"vocab_size": 300, "eos_token_id": 2, "gated": True}
    MixtureForCausalLM(MixtureConfig(**sizes, **heads, **mixture, **tokens)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def hostile(good, tmp_path) -> Path:
    """A copy of a good model folder, which an attack will change."""
    return Path(shutil.copytree(good, tmp_path / "hostile"))


@pytest.fixture
def canary(tmp_path) -> Path:
    """The file that is there once hostile code has run."""
    return tmp_path / "owned"


def without_weights(folder: Path) -> bytes:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    return content


def write_index(folder: Path, shard: str, index: str = "model.safetensors.index.json") -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}))


def bin_archive(folder: Path, canary: Path) -> None:
    without_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(pickled(canary, archive=True))


def bin_bare(folder: Path, canary: Path) -> None:
    without_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(pickled(canary, archive=False))


def bin_shards(folder: Path, canary: Path) -> None:
    write_index(folder, "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json")
    without_weights(folder)
    (folder / "pytorch_model-00001-of-00001.bin").write_bytes(pickled(canary, archive=True))


def pt(folder: Path, canary: Path) -> None:
    without_weights(folder)
    (folder / "model.pt").write_bytes(pickled(canary, archive=True))


def pickle_named_safetensors(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickled(canary, archive=True))


def weights_named_in_the_configuration(folder: Path, canary: Path) -> None:
    without_weights(folder)
    (folder.parent / "elsewhere.bin").write_bytes(pickled(canary, archive=True))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "../elsewhere.bin"}))


def index_above(folder: Path, canary: Path) -> None:
    write_index(folder, "../elsewhere.safetensors")
    (folder.parent / "elsewhere.safetensors").write_bytes(without_weights(folder))


def index_absolute(folder: Path, canary: Path) -> None:
    elsewhere = folder.parent / "elsewhere.safetensors"
    write_index(folder, str(elsewhere))
    elsewhere.write_bytes(without_weights(folder))


def link_out(folder: Path, canary: Path) -> None:
    elsewhere = folder.parent / "elsewhere.safetensors"
    elsewhere.write_bytes(without_weights(folder))
    (folder / "model.safetensors").symlink_to(elsewhere)


def linked_licence(folder: Path, canary: Path) -> None:
    (folder.parent / "secret").write_text("the password")
    (folder / "LICENSE").symlink_to(folder.parent / "secret")


def linked_folder(folder: Path, canary: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder / "additional_chat_templates").symlink_to(folder.parent / "elsewhere")


def huge_header(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def remote_code(folder: Path, canary: Path) -> None:
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoModel": "evil.Model"}
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).touch()\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": names}))


ATTACKS = [
    *(bin_archive, bin_bare, bin_shards, pt, pickle_named_safetensors, weights_named_in_the_configuration),
    *(index_above, index_absolute, link_out, linked_licence, linked_folder, huge_header, remote_code),
]

VERBS: dict[str, Callable[..., Any]] = {
    "evaluate": lambda folder, text, out: mixtura.evaluate(folder, str(text), sequence_length=16),
    "generate": lambda folder, text, out: load_model(folder),
    "diagnose": lambda folder, text, out: mixtura.diagnose(folder, [f"a={text}", f"b={text}"], out=out),
    "calibrate": lambda folder, text, out: mixtura.calibrate(folder, out, text),
    "transition": lambda folder, text, out: mixtura.transition(folder, out, to="alone"),
    "export": lambda folder, text, out: mixtura.export(folder, out, to="remote_code"),
    "verify": lambda folder, text, out: mixtura.verify(folder, folder),
    "upcycle": lambda folder, text, out: mixtura.upcycle(str(folder), out),
    "train": lambda folder, text, out: mixtura.train(start=str(folder), text=text, out=out),
    "finetune": lambda folder, text, out: load_base(str(folder)),
}
"""What each verb does with a model folder; `finetune` and `generate` by the one function that they open it with."""


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_takes_a_hostile_model_folder(hostile, canary, tiny_text, tmp_path, verb, attack):
    attack(hostile, canary)
    with pytest.raises(UserError) as refusal:
        VERBS[verb](hostile, tiny_text, tmp_path / "out")
    assert "\n" not in str(refusal.value) and "hostile" in str(refusal.value)
    assert not canary.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["calibrate", "export", "finetune", "transition"])
def test_the_folder_is_taken_before_it_is_changed(good, tiny_text, tmp_path, verb):
    VERBS[verb](good, tiny_text, tmp_path / "out")


def test_the_pickles_would_run_code_where_they_are_trusted(canary):
    torch.load(io.BytesIO(pickled(canary, archive=True)), weights_only=False)
    assert canary.exists()


def test_a_snapshot_in_the_hubs_cache_may_link_to_its_blobs(good, tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    shutil.copytree(good, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    load_model(snapshot)
    (snapshot / "LICENSE").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"'LICENSE' of .* is a link out of its folder"):
        load_model(snapshot)


@pytest.mark.parametrize("attack", [index_above, index_absolute, pt, huge_header, link_out], ids=lambda a: a.__name__)
def test_tensors_are_read_from_inside_the_folder_alone(hostile, canary, attack):
    attack(hostile, canary)
    with pytest.raises(UserError, match="hostile"):
        check_inside(hostile)
        StoredWeights(hostile)


@pytest.mark.parametrize("attack", [bin_archive, pickle_named_safetensors, link_out], ids=lambda a: a.__name__)
@pytest.mark.parametrize("kind", ["adapter", "classifier", "translation"])
def test_no_trained_part_is_a_pickle_or_lies_elsewhere(good, hostile, canary, kind, attack):
    attack(hostile, canary)
    for weights in [*hostile.glob("model.safetensors"), *hostile.glob("pytorch_model.bin")]:
        weights.rename(hostile / weights.name.replace("pytorch_model", "model").replace("model", "adapter_model"))
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(good)}
    (hostile / "adapter_config.json").write_text(json.dumps(adapter))
    manifest = {"base": str(good), "num_layers": None, "base_digest": "", "tune": "adapter", "adapter": None}
    head = {"head": {"feed_forward": None}, "baseline_parameters": None, "num_states": 1, "hidden_size": 16}
    (hostile / "classifier.json").write_text(
        json.dumps({"format": 1, **manifest, **head, "labels": ["a", "b"], "max_length": 8})
    )
    settings = {"prompt": "tags", "directions": ["en-de"], "max_length": 32, "experts": None, "experts_through": "x"}
    (hostile / "translation.json").write_text(json.dumps({**settings, "base": {"name": str(good), "num_layers": None}}))
    with pytest.raises(UserError) as refusal:
        {
            "adapter": lambda: load_adapter(load_base(str(good))[0], hostile),
            "classifier": lambda: classify(hostile, ["a"]),
            "translation": lambda: translate(hostile, "a", source_language="en", target_language="de"),
        }[kind]()
    assert "\n" not in str(refusal.value) and not canary.exists()


def test_a_tokenizer_of_a_recipe_is_read_like_a_model(hostile, canary):
    remote_code(hostile, canary)
    (hostile / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}}))
    with pytest.raises(UserError, match="contains custom code"):
        load_tokenizer(str(hostile))
    assert not canary.exists()
    linked_licence(hostile, canary)
    with pytest.raises(UserError, match="is a link out of its folder"):
        load_tokenizer(str(hostile))


def test_a_saved_state_of_training_never_runs_code(canary, tmp_path):
    (tmp_path / "optimizer.pt").write_bytes(pickled(canary, archive=True))
    with pytest.raises(UserError, match=r"is damaged: optimizer\.pt cannot be read \(it has a pickle"):
        load_tensors(tmp_path / "optimizer.pt")
    assert not canary.exists()


def test_an_archive_of_compiled_kernels_stays_in_its_folder(tmp_path):
    pack = tmp_path / "pack"
    pack.mkdir()
    with tarfile.open(pack / f"{stages.COMPILED}.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("../escaped")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(tarfile.OutsideDestinationError):
        stages._unpack_compiled(pack)
    assert not (tmp_path / "escaped").exists()


NAMES = ["../x", "/x", "a/b", "..", ".", "", "a\0b", "a\nb", "x" * 300, "a\\b", "con/../../x", "~", "é/"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
@pytest.mark.parametrize("what", ["name", "arm"])
def test_no_name_in_a_recipe_leads_out_of_the_folder(what, name):
    arm, recipe = ("dense", name) if what == "name" else (name, "fine")
    table = {"name": recipe, "seeds": [0], "baseline": arm, "arms": {arm: {"family": "dense"}}}
    with pytest.raises(UserError, match="cannot be a folder"):
        recipe_from_dict(table)


def test_a_recipe_is_data():
    hostile = "{{ ''.__class__ }} ${HOME} $(touch owned) `touch owned` %(x)s"
    table = {"name": "fine", "description": hostile, "seeds": [0], "arms": {"dense": {"family": "dense"}}}
    assert recipe_from_dict(table).description == hostile
