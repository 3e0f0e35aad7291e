"""Texts as tokens and as features: what is cut, what the cache keeps, and that features are what the model gives."""

import numpy as np
import pytest
import torch

from mixtura.config import HeadConfig
from mixtura.tasks.classification.classifier import load_encoder
from mixtura.tasks.classification.features import (
    FeatureExamples,
    ScheduledExamples,
    compute_features,
    encode_texts,
    hidden_states,
    pooled_features,
    weights_digest,
)
from mixtura.tasks.classification.heads import pool_states

TEXTS = ["a good film", "the plot was very very very dull", "good", "a film a film a film a film a film"]


@pytest.fixture
def encoder(encoder_folder):
    return load_encoder(str(encoder_folder), num_layers=None)


@pytest.fixture
def examples(encoder):
    return encode_texts(TEXTS, np.array([1, 0, 1, 0]), encoder[1], max_length=8)


def silent(_phrase):
    pass


def test_longer_texts_are_cut_and_counted(examples, encoder):
    assert examples.length_N.tolist() == [5, 8, 3, 8] and examples.truncated == 2
    assert examples.ids[1][-1] == encoder[1].sep_token_id


def test_a_text_without_tokens_becomes_one_token(encoder):
    tokenizer = encoder[1]
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.eos_token = "[SEP]"
    assert encode_texts([""], np.array([0]), tokenizer, max_length=8).ids[0].tolist() == [tokenizer.sep_token_id]


def test_a_batch_is_padded_behind_its_texts(examples):
    batch = examples.collate([examples.item(0), examples.item(1)])
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * 3, [1] * 8]
    assert batch["input_ids"][0, 5:].tolist() == [0, 0, 0] and batch["labels"].tolist() == [1, 0]


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_features_are_what_the_model_gives_each_text_alone(encoder, examples, pooling):
    head = HeadConfig(pooling=pooling)
    features_NMD = compute_features(encoder[0], examples, head)
    assert features_NMD.shape == (4, 3, 16)
    for index, ids in enumerate(examples.ids):
        ids_BL = torch.from_numpy(ids.astype("int64")).unsqueeze(0)
        with torch.no_grad():
            states = hidden_states(encoder[0], ids_BL, torch.ones_like(ids_BL))
        live = pool_states(states, torch.ones_like(ids_BL), head)[0].numpy()
        np.testing.assert_allclose(features_NMD[index], live, atol=1e-6)


def test_features_are_computed_once(encoder, examples, tmp_path):
    phrases = []
    first = pooled_features(encoder[0], examples, HeadConfig(), cache_dir=tmp_path, on_progress=phrases.append)
    second = pooled_features(encoder[0], examples, HeadConfig(), cache_dir=tmp_path, on_progress=phrases.append)
    assert phrases == ["computing features", "loading cached features"]
    np.testing.assert_array_equal(first, second)


def test_other_weights_tokens_or_pooling_are_other_features(encoder, examples, encoder_folder, tmp_path):
    phrases = []

    def features(model, texts, head):
        pooled_features(model, texts, head, cache_dir=tmp_path, on_progress=phrases.append)

    features(encoder[0], examples, HeadConfig())
    features(encoder[0], examples, HeadConfig(pooling="last"))
    features(encoder[0], examples, HeadConfig(normalization="none"))
    features(encoder[0], examples.part(slice(1, 4)), HeadConfig())
    with torch.no_grad():
        next(encoder[0].parameters())[4, 0] += 1e-3
    features(encoder[0], examples, HeadConfig())
    assert phrases == ["computing features"] * 5


def test_the_kind_of_head_does_not_change_the_features(encoder, examples, tmp_path):
    phrases = []
    for head in (HeadConfig(), HeadConfig(kind="layer_mix")):
        pooled_features(encoder[0], examples, head, cache_dir=tmp_path, on_progress=phrases.append)
    assert phrases == ["computing features", "loading cached features"]


def test_damaged_features_are_computed_again(encoder, examples, tmp_path):
    good = pooled_features(encoder[0], examples, HeadConfig(), cache_dir=tmp_path, on_progress=silent)
    (file,) = tmp_path.glob("features-*/features.npy")
    data = bytearray(file.read_bytes())
    data[-3] ^= 255
    file.write_bytes(data)
    again = pooled_features(encoder[0], examples, HeadConfig(), cache_dir=tmp_path, on_progress=silent)
    np.testing.assert_array_equal(again, good)


def test_features_leave_a_training_model_as_it_was(encoder, examples):
    encoder[0].train()
    compute_features(encoder[0], examples, HeadConfig())
    assert encoder[0].training


def test_the_digest_follows_the_weights(encoder):
    before = weights_digest(encoder[0])
    assert before == weights_digest(encoder[0])
    with torch.no_grad():
        next(encoder[0].parameters())[0, 0] += 1
    assert before != weights_digest(encoder[0])


def test_the_order_is_the_same_for_tokens_and_features(examples):
    features = FeatureExamples(np.zeros((4, 3, 16), dtype=np.float32), examples.labels, examples.length_N)
    orders = [
        [item["labels"] for item in (ScheduledExamples(kind, length=10, seed=3)[i] for i in range(10))]
        for kind in (examples, features)
    ]
    assert orders[0] == orders[1]
    with pytest.raises(IndexError):
        ScheduledExamples(examples, length=10, seed=3)[10]


def test_one_state_alone_is_kept_for_heads_that_read_no_other():
    whole = FeatureExamples(np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.zeros(2), np.ones(2))
    assert whole.one_state(-1).features_NMD.tolist() == whole.features_NMD[:, 2:].tolist()
    assert whole.one_state(1).features_NMD.tolist() == whole.features_NMD[:, 1:2].tolist()
