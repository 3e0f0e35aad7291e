import pytest

from mixtura.config import UserError
from mixtura.training.saving import check_settings, first_difference, settings_hash


def test_equal_settings_are_accepted_again(tmp_path):
    for _ in range(2):
        check_settings(tmp_path, {"seed": 1, "rates": (0.1, 0.2)})


def test_a_changed_setting_is_named_with_both_values_and_the_fix(tmp_path):
    check_settings(tmp_path, {"seed": 1, "training": {"steps": 5, "batch_size": 4}})
    with pytest.raises(UserError, match=r"training.batch_size = 4, and now it is 8: set it back to resume"):
        check_settings(tmp_path, {"seed": 1, "training": {"steps": 5, "batch_size": 8}})


def test_unreadable_settings_are_a_users_error(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="not readable"):
        check_settings(tmp_path, {})


@pytest.mark.parametrize(
    ("before", "now", "difference"),
    [
        ({"a": 1}, {"a": 1}, None),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, ("a.b", [1, 2], [1, 3])),
        ({"a": 1}, {"a": 1, "b": 2}, ("b", None, 2)),
        ({"a": 1, "b": 2}, {"a": 1}, ("b", 2, None)),
    ],
    ids=["equal", "nested", "added", "removed"],
)
def test_the_first_difference_is_found(before, now, difference):
    assert first_difference(before, now) == difference


def test_the_hash_follows_the_settings_not_their_order():
    assert settings_hash({"a": 1, "b": 2}) == settings_hash({"b": 2, "a": 1}) != settings_hash({"a": 1, "b": 3})
