"""One tree of settings a recipe, filled by defaults, YAML files, environment and flags, in this order.

Every key is known, typed and bounded: an unknown key, a wrong type, NaN or a value out of bounds is refused by name,
with the nearest known key as a suggestion. `None` means "follow the data and the device"; the recipe puts a value
there before the run begins, so that the `config.yaml` of a run has none left and repeats it. Only `loaders` stays open:
it follows each machine and changes nothing but speed.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from cyclopts import Parameter
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    WrapValidator,
    field_validator,
    model_validator,
)

from spade3d.faults import UsageFault

MAX_YAML_BYTES = 1 << 20


def whole_number(written: Any) -> Any:
    """A flag is a word: "4" as 4, where one of some numbers is to be chosen; anything else as it is."""
    return int(written) if isinstance(written, str) and written.isdecimal() else written


def ordered(ends: tuple[float, float]) -> tuple[float, float]:
    """A range from its lower to its upper end; ValueError the other way round."""
    if ends[0] > ends[1]:
        raise ValueError("the lower end of a range comes first")
    return ends


def encoder_of_run(path: str) -> str:
    """In the folder of a run its encoder; any other path as it is."""
    inside = Path(path) / "encoder.safetensors"
    return str(inside) if inside.is_file() else path


class ReadBeside:
    """Marks a setting that names a file or a folder which a run reads beside its scans."""


InputPath = Annotated[str, ReadBeside]
CheckpointPath = Annotated[str, ReadBeside, AfterValidator(encoder_of_run)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
CellSide = Annotated[Literal[1, 2, 4, 8, 16], BeforeValidator(whole_number)]
Count = Annotated[int, Field(ge=1)]
Range = Annotated[tuple[float, float], AfterValidator(ordered)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(ordered)]
ShareRange = Annotated[tuple[Share, Share], AfterValidator(ordered)]
Voxels = tuple[Annotated[int, Field(ge=8)], Annotated[int, Field(ge=8)], Annotated[int, Field(ge=8)]]
Millimetres = tuple[Positive, Positive, Positive]
Switches = Annotated[tuple[bool, bool, bool], Parameter(n_tokens=3)]  # three words, where a switch alone takes none
NATIVE = "native"


def or_native(value: Any, otherwise) -> Any:
    """Lets the word pass where lengths are read; a union would name its branches in every fault, and not the key."""
    return NATIVE if value == NATIVE or value == [NATIVE] * 3 else otherwise(value)


_FLAGS_ALONE: ContextVar[bool] = ContextVar("flags_alone", default=False)


def rule(check: Callable[[Any], Any]) -> Any:
    """A method of a tree that refuses keys which do not go together: it returns the tree, or raises ValueError.

    Flags alone are not asked (`FLAGS`): what they need may stand in a file. The whole is asked, when it is merged.
    """

    def of_the_whole(self: Any) -> Any:
        return self if _FLAGS_ALONE.get() else check(self)

    of_the_whole.__name__, of_the_whole.__doc__ = check.__name__, check.__doc__
    return model_validator(mode="after")(of_the_whole)


def _flags_alone(given: Any, read: Callable[[Any], Any]) -> Any:
    before = _FLAGS_ALONE.set(True)
    try:
        return read(given)
    finally:
        _FLAGS_ALONE.reset(before)


FLAGS = WrapValidator(_flags_alone)  # of a command's tree: each flag by itself is looked at, and no `rule` is asked


def spelled_out(tokens: Sequence[str]) -> list[str]:
    """A command line in which `--data.spacing native` is three words, as many as the option takes lengths."""
    option, line = "--data.spacing", []
    for token in tokens:
        line += [option, NATIVE] if token == f"{option}={NATIVE}" else [token]
        if line[-2:] == [option, NATIVE]:
            line += [NATIVE] * 2
    return line


class Settings(BaseModel):
    """A part of the tree; frozen, closed to unknown keys, and without NaN.

    The words below a setting are its line in --help; a tree that sets it otherwise inherits them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def truth_is_no_number(cls, value: Any, info) -> Any:
        """pydantic would read `steps: yes` as 1."""
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and kind is not bool and bool not in get_args(kind):
            raise ValueError("true and false are for switches only")
        return value


class Data(Settings):
    """Which scans, and how they are prepared."""

    path: str | None = None
    """the scans: a folder, a dataset in any known layout, a JSON list or a store; the same as DATA."""
    spacing: Annotated[SerializeAsAny[Millimetres | None], WrapValidator(or_native)] = None
    """mm along right-left, front-back, foot-head, or native, each scan's own; left out, the median of the set."""
    window_hu: Range = (-175.0, 250.0)
    """of CT, in HU; what lies outside is cut off."""
    mr: Literal["percentile", "zscore"] = "percentile"
    """how intensities of MR are scaled."""


class Network(Settings):
    """The Swin-UNETR."""

    feature_size: Annotated[int, Field(ge=12, le=192, multiple_of=12)] | None = None
    """channels of the first stage, a multiple of 12; left out, 48 on a GPU and 24 on a CPU, or the checkpoint's."""
    depths: tuple[Count, Count, Count, Count] = (2, 2, 2, 2)
    """blocks of each of the four stages."""
    heads: tuple[Count, Count, Count, Count] = (3, 6, 12, 24)
    """attention heads of each of the four stages."""
    window: Annotated[int, Field(ge=2, le=16)] = 7
    """side of an attention window, in cells."""
    drop_path: Share = 0.0
    """share of blocks skipped by chance in training; 0 skips none."""
    use_v2: bool = False
    """a residual convolution block before each stage (SwinUNETR-V2)."""
    merging: Literal["v1", "v2"] = "v1"
    """order in which 2 x 2 x 2 cells are joined: MONAI's merging or mergingv2."""
    monai_compatible: bool = False
    """read the bias of windows that the crop clips as MONAI does."""

    @rule
    def heads_share_the_width(self) -> Network:
        """Stage s is feature_size * 2^s channels wide; its heads share them evenly."""
        for stage, heads in enumerate(self.heads):
            width = (self.feature_size or 0) * 2**stage
            if width % heads:
                raise ValueError(f"{heads} heads cannot share the {width} channels of stage {stage + 1} evenly")
        return self


class Optim(Settings):
    """AdamW with linear warm-up and a cosine, both as shares of the run."""

    lr: Positive = 5e-4
    """learning rate of AdamW, at its peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """of AdamW; 0 has none."""
    warmup: Share = 0.1
    """share of the run in which the rate rises from 0."""
    floor: Share = 0.01
    """the rate at the end of the run, as a share of its peak."""
    clip_norm: Positive | None = 1.0
    """longest gradient of a step; longer ones are scaled down to it."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """batches that make one step."""


class Common(Settings):
    """What every run has."""

    steps: Annotated[int, Field(ge=1)] | None = None
    """updates of the weights; left out, what suits the data and the device."""
    seed: Annotated[int, Field(ge=0)] = 0
    """of all that chance decides."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; auto is a GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 on a GPU that has it, else fp32."""
    compile: bool = False
    """compile the encoder first: minutes at the start, faster steps."""
    channels_last: bool = False
    """keep the channels of convolutions last in memory; the same sums, faster on some GPUs."""
    workers: Annotated[int, Field(ge=0)] = 0
    """processes that prepare scans; 0 follows the machine."""
    loaders: Annotated[int, Field(ge=0)] | None = None
    """processes that cut crops; 0 cuts them in the training process; left out, it follows the device."""
    folds: Annotated[int, Field(ge=2, le=100)] = 5
    """parts that the subjects are split into, one of which is held out."""
    fold: Annotated[int, Field(ge=0)] = 0
    """the part that is held out, counted from 0."""
    save_every: Annotated[int, Field(ge=1)] | None = None
    """steps between checkpoints; left out, a share of the run."""
    skip_bad_batches: Annotated[int, Field(ge=0)] = 9
    """updates in a row that may be NaN or Inf, and are left out, before the run ends; 0 allows none."""
    data: Data = Data()
    network: Network = Network()

    @field_validator("fold")
    @classmethod
    def fold_is_one_of_the_folds(cls, fold: int, info) -> int:
        """Refused here, before anything is prepared; a set of few subjects has fewer folds still."""
        folds = info.data.get("folds")  # absent where it was itself refused
        if folds is not None and fold >= folds and not _FLAGS_ALONE.get():
            raise ValueError(f"folds are counted from 0 to {folds - 1}; --folds makes more of them")
        return fold


class Pretraining(Common):
    """What every pretraining has besides: whom it leaves to be judged later."""

    protocol: str = "holdout"
    """whose judges are held out (docs/protocols.md); holdout: those of --folds and --fold."""
    hold_out: str | None = None
    """a text file with a subject on each line, who are held out instead."""

    @rule
    def one_rule(self) -> Pretraining:
        if self.hold_out is not None and self.protocol != "holdout":
            raise ValueError("protocol and hold_out both say who is held out; give one of them")
        return self


Tree = TypeVar("Tree", bound=Settings)
NOTHING: tuple[str, Mapping[str, Any]] = ("", {})


def resolve(
    tree: type[Tree], files: Sequence[Path], flags: Mapping[str, Any], environment=os.environ, beneath=NOTHING
) -> Tree:
    """Defaults < files, left to right < environment `SPADE_OPTIM__LR=...` < flags. Raises UsageFault by key.

    `beneath`: a name and a layer between the defaults and the files, such as what a protocol fixes.
    """
    layers = [beneath, *((str(path), read_yaml(path)) for path in files)]
    layers += [("environment", from_environment(environment)), ("command line", dict(flags))]
    merged: dict[str, Any] = {}
    origin: dict[tuple[str, ...], str] = {}
    for source, layer in layers:
        merge(merged, layer, source, origin)
    try:
        return tree.model_validate(merged)
    except ValidationError as error:
        raise UsageFault("; ".join(explain(tree, problem, origin) for problem in error.errors())) from None


def read_beside(settings: Settings) -> dict[str, Path]:
    """The files and folders that a run of some settings reads beside its scans, by dotted key."""
    found: dict[str, Path] = {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Settings):
            found |= {f"{name}.{key}": path for key, path in read_beside(value).items()}
        elif value is not None and _is_read_beside(field.annotation, field.metadata):
            found[name] = Path(value)
    return found


def _is_read_beside(annotation: Any, metadata: Sequence[Any]) -> bool:
    branches = (getattr(one, "__metadata__", ()) for one in get_args(annotation))
    return ReadBeside in metadata or any(ReadBeside in branch for branch in branches)


def merge(into: dict, layer: Mapping, source: str, origin: dict, path: tuple[str, ...] = ()) -> None:
    """Lay one layer over the others, key by key; remember where each key came from."""
    for key, value in layer.items():
        here = (*path, str(key))
        origin[here] = source
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value, source, origin, here)
        elif isinstance(value, Mapping):
            into[key] = {}
            merge(into[key], value, source, origin, here)
        else:
            into[key] = value


def explain(tree: type[Settings], problem: Mapping, origin: Mapping) -> str:
    """One sentence for one problem: where it was written, which key, what was found, what is needed."""
    where = tuple(str(part) for part in problem["loc"])
    written = next((origin[where[:n]] for n in range(len(where), 0, -1) if where[:n] in origin), "configuration")
    key = ".".join(where)
    if problem["type"] == "extra_forbidden":
        near = nearest_key(key, known := known_keys(tree))
        hint = f"did you mean {near}?" if near else "`--help` lists the known keys"
        if near and key.startswith(f"{near}."):
            hint = f"{near} has {', '.join(k.removeprefix(f'{near}.') for k in known if k.startswith(f'{near}.'))}"
        return f"{written}: {key} is not a known key; {hint}"
    said = problem["msg"].removeprefix("Value error, ")
    if not where:  # a rule of the whole tree, which is too much to be quoted
        return said
    return f"{written}: {key}: {_brief.repr(problem['input'])} given; {said[0].lower()}{said[1:]}"


def nearest_key(key: str, known: Sequence[str]) -> str | None:
    """The known key, or part of the tree, most like this one, as a whole or in its last word (`lr`: `optim.lr`)."""
    named = sorted({*known, *(parent for path in known if (parent := path.rpartition(".")[0]))})

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(whole, 0.99 * last)

    best = max(named, key=likeness)
    return best if likeness(best) >= 0.6 else None


_brief = reprlib.Repr()
_brief.maxdict, _brief.maxlevel, _brief.maxstring, _brief.maxother = 3, 3, 80, 80


def known_keys(tree: type[Settings], prefix: str = "") -> list[str]:
    """Every key of a tree, dotted."""
    keys = []
    for name, field in tree.model_fields.items():
        nested = field.annotation if isinstance(field.annotation, type) else None
        if nested and issubclass(nested, Settings):
            keys += known_keys(nested, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """SPADE_OPTIM__LR=3e-4 is optim.lr: 3e-4; values are read as YAML."""
    layer: dict[str, Any] = {}
    for name, text in sorted(environment.items()):
        if not name.startswith("SPADE_"):
            continue
        *parents, key = name.removeprefix("SPADE_").lower().split("__")
        place = layer
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise UsageFault(f"{name}: {parent} was given a value of its own by another variable; keep one of them")
        place[key] = parse_yaml(text, name)
    return layer


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file; duplicate keys, aliases and Python tags are refused."""
    if not path.is_file():
        raise UsageFault(f"{path}: no such configuration file; give the path of a YAML file")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise UsageFault(f"{path}: {path.stat().st_size} bytes; a configuration of at most {MAX_YAML_BYTES} is read")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageFault(f"{path}: not readable as UTF-8 text ({error}); give a YAML file") from None
    content = parse_yaml(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageFault(f"{path}: holds a {type(content).__name__}; a mapping of settings is needed")
    return content


def parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-13-01
        reason = " ".join(str(error).split())
        raise UsageFault(f"{source}: not readable as YAML ({reason}); correct it there") from None


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and aliases, and reads 2e-4 as a number (YAML 1.1 would not).

    Ten aliases of ten aliases, nine times over, are a billion values, and an alias of itself never ends; settings need
    none.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"alias *{event.anchor}, line {event.start_mark.line + 1}: write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"a key that is no word ({key!r}), line {key_node.start_mark.line + 1}")
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} is given twice, line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def to_yaml(settings: Settings) -> str:
    """The tree as YAML that `read_yaml` reads back to the same tree."""
    return yaml.dump(settings.model_dump(mode="json"), Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)


class _PlainDumper(yaml.SafeDumper):
    """SafeDumper that writes a value out again instead of an alias."""

    def ignore_aliases(self, data):
        return True


def with_values(settings: Tree, values: Mapping[str, Any]) -> Tree:
    """The tree with dotted keys set, validated again: what a recipe uses to put in what it chose.

    UsageFault where what was given does not go with what was chosen.
    """
    content = settings.model_dump()
    for dotted, value in values.items():
        *parents, key = dotted.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        place[key] = value
    try:
        return type(settings).model_validate(content)
    except ValidationError as error:
        raise UsageFault("; ".join(explain(type(settings), problem, {}) for problem in error.errors())) from None
