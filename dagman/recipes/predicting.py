"""How scans are segmented: what `dagman-predict` can be told beside the model and the scans."""

from __future__ import annotations

from dataclasses import dataclass

from spade3d.faults import UsageFault

AXES = "ras"  # R (left and right), A, S: the axes of a prepared scan
FORMATS = ("nifti", "same")
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class Segmenting:
    """UsageFault where it cannot be.

    batch              windows at once; None: as many as suit the device
    flips              letters of "ras", or "all": the mean over every set of flips along these axes; None: no flips
    largest_component  keep only the largest connected piece of each class
    exempt             names of the classes that may lie in several pieces
    format             "nifti", or "same": NRRD for NRRD, MHA for MetaImage
    precision          of the network: "auto" (bf16 on CUDA devices that have it, else fp32), "fp32" or "bf16"
    """

    batch: int | None = None
    flips: str | None = None
    largest_component: bool = False
    exempt: tuple[str, ...] = ()
    format: str = "nifti"
    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            raise UsageFault(f"--batch {self.batch}: at least 1 window at once is needed")
        letters = AXES if self.flips is None else self.letters
        if not letters or set(letters) - set(AXES) or len(set(letters)) < len(letters):
            raise UsageFault(f"--flips {self.flips}: letters of {AXES}, each once, or all, are needed")
        if self.exempt and not self.largest_component:
            raise UsageFault(f"--except {self.exempt[0]} without --largest-component; give both, or neither")
        if self.format not in FORMATS:
            raise UsageFault(f"--format {self.format}: one of {', '.join(FORMATS)} is needed")
        if self.precision not in PRECISIONS:
            raise UsageFault(f"--precision {self.precision}: one of {', '.join(PRECISIONS)} is needed")

    @property
    def letters(self) -> str:
        """Of the axes, in lower case."""
        asked = (self.flips or "").lower()
        return AXES if asked == "all" else asked

    @property
    def axes(self) -> tuple[int, ...]:
        """To flip along: 0, 1, 2 for R, A, S."""
        return tuple(sorted(AXES.index(letter) for letter in self.letters))
