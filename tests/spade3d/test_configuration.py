"""Configuration: every layer lies over the one before, and whatever is wrong is named with what to do."""

from pathlib import Path
from typing import Annotated

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from spade3d.configuration import (
    FLAGS,
    Common,
    Data,
    Optim,
    Settings,
    from_environment,
    known_keys,
    parse_yaml,
    read_yaml,
    resolve,
    rule,
    spelled_out,
    to_yaml,
    with_values,
)
from spade3d.faults import UsageFault


class Tree(Common):
    """What a recipe has."""

    optim: Optim = Optim()


@pytest.fixture
def write(tmp_path):
    def write(text, name="config.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refused(files=(), flags=None, environment=None):
    with pytest.raises(UsageFault) as fault:
        resolve(Tree, files, flags or {}, environment or {})
    assert fault.value.exit_code == 2
    return str(fault.value)


def test_without_anything_the_defaults_hold():
    assert resolve(Tree, [], {}, {}) == Tree()


def test_files_then_environment_then_flags(write):
    first = write("optim: {lr: 1.0e-3, warmup: 0.2, floor: 0.1}\nseed: 1\n", "first.yaml")
    second = write("optim: {lr: 2.0e-3, warmup: 0.3}\nsteps: 7\n", "second.yaml")
    environment = {"SPADE_OPTIM__LR": "3e-3", "SPADE_SEED": "5", "SPADE3D_TEST_DATA": "/x", "OTHER": "1"}
    found = resolve(Tree, [first, second], {"optim": {"lr": 4e-3}}, environment)
    assert found.optim == Optim(lr=4e-3, warmup=0.3, floor=0.1)
    assert (found.seed, found.steps) == (5, 7)
    assert resolve(Tree, [second, first], {}, {}).optim.lr == 1e-3  # left to right


def test_layers_leave_what_they_were_given(write):
    flags = {"optim": {"lr": 1e-3}}
    resolve(Tree, [write("optim: {warmup: 0.3}")], flags, {"SPADE_OPTIM__FLOOR": "0.5"})
    assert flags == {"optim": {"lr": 1e-3}}


@pytest.mark.parametrize(
    ("tokens", "three"),
    [
        ("--data.spacing native --seed 1", "--data.spacing native native native --seed 1"),
        ("--seed 1 --data.spacing=native", "--seed 1 --data.spacing native native native"),
        ("native --data.spacing 1 1.5 2 native", "native --data.spacing 1 1.5 2 native"),
    ],
)
def test_the_word_native_stands_for_three_lengths_on_a_command_line(tokens, three):
    assert spelled_out(tokens.split()) == three.split()


def test_native_spacing_is_kept_as_the_word(write):
    for said in ("native", ["native"] * 3):
        assert resolve(Tree, [], {"data": {"spacing": said}}, {}).data.spacing == "native"
    tree = resolve(Tree, [write("data: {spacing: native}")], {}, {})
    assert resolve(Tree, [write(to_yaml(tree))], {}, {}) == with_values(tree, {"seed": 0}) == tree


def test_null_takes_back_a_choice(write):
    assert resolve(Tree, [write("steps: 9")], {"steps": None}, {}).steps is None


@pytest.mark.parametrize(
    ("text", "key", "needed"),
    [
        ("optim: {lr: -1}", "optim.lr", "greater than 0"),
        ("optim: {lr: .nan}", "optim.lr", "finite"),
        ("optim: {lr: .inf}", "optim.lr", "finite"),
        ("optim: {lr: fast}", "optim.lr", "number"),
        ("optim: {warmup: 1.5}", "optim.warmup", "less than or equal to 1"),
        ("optim: 5", "optim", "5 given"),
        ("optim: null", "optim", "None given"),
        ("steps: 0", "steps", "greater than or equal to 1"),
        ("steps: 2.5", "steps", "integer"),
        ("steps: yes", "steps", "switches"),
        ("device: gpu", "device", "'cuda'"),
        ("network: {use_v2: 7}", "network.use_v2", "boolean"),
        ("network: {feature_size: 25}", "network.feature_size", "multiple of 12"),
        ("network: {heads: [3, 6, 12]}", "network.heads.3", "required"),
        ("network: {heads: [3, 6, 12, 0]}", "network.heads.3", "greater than or equal to 1"),
        ("network: {feature_size: 24, heads: [5, 6, 12, 24]}", "network", "5 heads cannot share the 24 channels"),
        ("data: {spacing: [1, 0, 1]}", "data.spacing.1", "greater than 0"),
        ("data: {spacing: own}", "data.spacing", "valid tuple"),
        ("data: {window_hu: [250, -175]}", "data.window_hu", "lower end of a range comes first"),
        ("fold: {}", "fold", "integer"),
        ("folds: 4\nfold: 4", "fold", "folds are counted from 0 to 3"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(write, text, key, needed):
    path = write(text)
    message = refused([path])
    assert message.startswith(f"{path}: {key}: ") and needed in message and len(message) < 400


@pytest.mark.parametrize(
    ("text", "key", "suggestion"),
    [
        ("stepps: 5", "stepps", "steps"),
        ("optim: {learning_rate: 5, warm_up: 0}", "optim.warm_up", "optim.warmup"),
        ("lr: 1", "lr", "optim.lr"),
        ("network: {lr: 1}", "network.lr", "optim.lr"),
        ("netwrok: {window: 7}", "netwrok", "network"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(write, text, key, suggestion):
    assert f"{key} is not a known key; did you mean {suggestion}?" in refused([write(text)])


def test_an_unknown_key_of_a_section_is_answered_with_its_keys(write):
    message = refused([write("optim: {wd: 3}")])
    assert message.endswith(
        "optim.wd is not a known key; optim has lr, weight_decay, warmup, floor, clip_norm, accumulate"
    )


def test_a_key_like_none_is_sent_to_help(write):
    assert "zzzz is not a known key; `--help` lists the known keys" in refused([write("zzzz: 1")])


def test_each_fault_says_where_it_was_written(write):
    message = refused([write("optim: {lr: -1}")], {"steps": 0}, {"SPADE_SEDE": "3"})
    assert "config.yaml: optim.lr: -1 given" in message
    assert "command line: steps: 0 given" in message
    assert "environment: sede is not a known key; did you mean seed?" in message


def test_the_last_writer_of_a_key_is_blamed(write):
    assert refused([write("steps: 0")], {"steps": -4}).startswith("command line: steps: -4")


def test_a_huge_value_is_quoted_briefly(write):
    assert len(refused([write(f"steps: [{', '.join(['7'] * 9999)}]")])) < 300


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("steps: 1\nseed: 2\nsteps: 3\n", "'steps' is given twice, line 3"),
        ("optim:\n  lr: 1\n  lr: 2\n", "'lr' is given twice"),
        ("a: &a {b: 1}\nc: *a\n", r"alias \*a, line 2"),
        ("a: &a [*a]\n", "alias"),
        ("optim: &o {lr: *o}\n", "alias"),
        ("data: {path: !!python/object/apply:os.getcwd []}", "python"),
        ("steps: [1, 2", "expected"),
        ("steps: 1\n---\nsteps: 2\n", "document"),
        ("{[1, 2]: 3}", "a key that is no word"),
        ("seed: 1\non: 2\n", r"a key that is no word \(True\), line 2"),
        ("data: {path: 2026-13-01}", "month"),
        ("steps: \x07", "special characters"),
        ("[" * 50_000, "not readable"),
    ],
)
def test_what_yaml_cannot_say_once_is_refused(write, text, reason):
    path = write(text)
    with pytest.raises(UsageFault, match=reason) as fault:
        read_yaml(path)
    assert str(fault.value).startswith(f"{path}: ") and "\n" not in str(fault.value)


def test_an_alias_bomb_is_refused_before_anything_is_made_of_it(write, monkeypatch):
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 11)]
    made = []
    monkeypatch.setattr(yaml.SafeLoader, "construct_object", lambda *given, **how: made.append(given))
    assert "alias *a0, line 2: write the value out" in refused([write("\n".join(lines))])
    assert not made


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1, 2]", "holds a list; a mapping"),
        ("word", "holds a str; a mapping"),
        (b"\xff\xfe\x00\x01", "UTF-8"),
        (b"#" * (1 << 21), "2097152 bytes"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(write, content, reason):
    with pytest.raises(UsageFault, match=reason):
        read_yaml(write(content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageFault, match="nowhere.yaml: no such configuration file"):
        read_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(UsageFault, match="no such configuration file"):
        read_yaml(tmp_path)


def test_an_empty_file_says_nothing(write):
    assert read_yaml(write("")) == read_yaml(write("# only a comment\n")) == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("2.5E+3", 2500.0),
        (".5", 0.5),
        ("-1e-3", -1e-3),
        ("1_000.5", 1000.5),
        ("12", 12),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("-", [None]),
        ("word", "word"),
    ],
)
def test_numbers_are_numbers(text, value):
    found = parse_yaml(text, "here")
    assert found == value and type(found) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_python_writes_is_read(value):
    assert float(parse_yaml(repr(value), "here")) == value


def test_the_environment_is_nested_by_double_underscores():
    found = from_environment({"SPADE_NETWORK__HEADS": "[1, 2, 4, 8]", "SPADE_STEPS": "3", "HOME": "/"})
    assert found == {"network": {"heads": [1, 2, 4, 8]}, "steps": 3}
    assert from_environment({"SPADE_OPTIM": "{lr: 1}", "SPADE_OPTIM__FLOOR": "0"}) == {"optim": {"lr": 1, "floor": 0}}


def test_an_environment_that_contradicts_itself_is_refused():
    with pytest.raises(UsageFault, match="SPADE_OPTIM__LR: optim was given a value of its own"):
        from_environment({"SPADE_OPTIM": "5", "SPADE_OPTIM__LR": "1"})
    with pytest.raises(UsageFault, match="SPADE_STEPS: not readable as YAML"):
        from_environment({"SPADE_STEPS": "[1"})


def test_a_tree_goes_to_yaml_and_back(write):
    same = (1.0, 1.0, 1.0)
    for tree in (
        Tree(),
        Tree(optim=Optim(lr=1e-05, clip_norm=None), data=Data(path="/ä b/#1: [x]", spacing=same)),
        with_values(Tree(), {"data.spacing": same, "optim.lr": 123456789.123456789, "steps": 10**12}),
    ):
        path = write(to_yaml(tree))
        assert resolve(Tree, [path], {}, {}) == tree
        assert to_yaml(resolve(Tree, [path], {}, {})) == to_yaml(tree)
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["optim"]["lr"] in (tree.optim.lr, str(tree.optim.lr))


def test_to_yaml_writes_no_alias():
    numbers = (1.0, 2.0, 4.0)

    class Twice(Data):
        other: tuple[float, float, float] = numbers

    assert "*" not in to_yaml(Twice(spacing=numbers, other=numbers))


def test_with_values_sets_dotted_keys_and_checks_them():
    tree = with_values(Tree(), {"optim.lr": 0.1, "steps": 3})
    assert tree.optim.lr == 0.1 and tree.steps == 3 and tree.optim.floor == Optim().floor
    with pytest.raises(UsageFault, match="steps: 0 given"):
        with_values(Tree(), {"steps": 0})


def test_the_tree_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Tree().steps = 3


def test_known_keys_are_dotted():
    keys = known_keys(Tree)
    assert {"steps", "optim.lr", "network.heads", "data.window_hu"} <= set(keys) and "optim" not in keys


def test_a_relative_path_is_left_as_written(write, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write("data: {path: ../scans}")
    assert resolve(Tree, [Path("config.yaml")], {}, {}).data.path == "../scans"


class Pair(Settings):
    """Two keys that go together."""

    low: int = 0
    high: int = 0

    @rule
    def in_order(self):
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


class WithPair(Common):
    pair: Pair = Pair()

    @rule
    def seed_has_a_pair(self):
        if self.seed and not self.pair.high:
            raise ValueError("a seed needs a pair")
        return self


FLAG_ADAPTER = TypeAdapter(Annotated[WithPair, FLAGS])


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        ("pair: {high: 5}", {"pair": {"low": 3}}, ""),
        ("folds: 9", {"fold": 7}, ""),
        ("pair: {high: 1}", {"seed": 2}, ""),
        ("pair: {high: 2}", {"pair": {"low": 3}}, r"^command line: pair: \{.*\} given; low is above high$"),
        ("folds: 3", {"fold": 4}, "^command line: fold: 4 given; folds are counted from 0 to 2"),
        ("{}", {"seed": 2}, "^a seed needs a pair$"),
    ],
)
def test_what_goes_together_is_asked_of_the_whole_and_not_of_flags_alone(write, text, flags, said):
    told = FLAG_ADAPTER.validate_python(flags).model_dump(exclude_unset=True)
    assert told == flags
    if not said:
        assert resolve(WithPair, [write(text)], told, {}).model_dump(include=flags.keys(), exclude_unset=True)
        return
    with pytest.raises(UsageFault, match=said):
        resolve(WithPair, [write(text)], told, {})


def test_a_flag_by_itself_is_still_looked_at_and_trees_made_by_hand_obey_every_rule():
    with pytest.raises(ValidationError, match="valid integer"):
        FLAG_ADAPTER.validate_python({"seed": "many"})
    for wrong in ({"seed": 1}, {"pair": {"low": 1}}, {"fold": 5}):
        FLAG_ADAPTER.validate_python(wrong)
        with pytest.raises(ValidationError):
            WithPair.model_validate(wrong)
