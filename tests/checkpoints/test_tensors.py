"""The files that go along with a model's weights."""

import os

from mixtura.checkpoints.tensors import copy_companions


def test_tokenizer_template_settings_and_licence_go_along_and_nothing_else(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "folder"
    folder.mkdir()
    along = ["LICENSE", "NOTICE.txt", "chat_template.jinja", "generation_config.json", "spiece.model"]
    along += ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    for name in [*along, "README.md", "config.json", "model.safetensors", "optimizer.pt"]:
        source.mkdir(exist_ok=True)
        (source / name).write_text(name)
    (source / "tokenizer_files").mkdir()
    copy_companions(source, folder)
    assert sorted(os.listdir(folder)) == sorted(along)
    assert all((folder / name).read_text() == name for name in along)
