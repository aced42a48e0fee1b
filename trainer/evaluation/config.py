"""The section ``evaluate``: what is measured while training."""

from pathlib import Path

from pydantic import Field, model_validator

from trainer.config import Section, refuse_idle, unit


class EvaluateConfig(Section):
    """Verification while training (trainer/evaluation/periodic.py)."""

    every_steps: int = Field(
        0,
        ge=0,
        description="updates between evaluations, and once at the end; 0: none",
        json_schema_extra=unit("updates"),
    )
    sets: dict[str, Path] = Field(
        default_factory=dict,
        description="name → verification .bin, or data set (DATASET or DATASET@LABELS.npy); never the training images",
    )
    old: Path | None = Field(None, description="old model: also measure new queries against its gallery")
    far: float = Field(1e-3, gt=0, lt=1, description="labelled sets: the false accept rate of SET.tar")
    max_images: int = Field(10_000, ge=4, description="labelled sets: about so many images at most, whole identities")

    @model_validator(mode="after")
    def _measured(self) -> "EvaluateConfig":
        if self.sets and not self.every_steps:
            raise ValueError("evaluate.sets: never measured with evaluate.every_steps=0; set it, or remove the sets")
        if self.every_steps and not self.sets:
            raise ValueError(
                f"evaluate.every_steps={self.every_steps}: nothing is measured without evaluate.sets; set it, or "
                "remove every_steps"
            )
        if self.old is not None and not self.sets:
            raise ValueError("evaluate.old: nothing is measured without evaluate.sets; set it, or remove old")
        if all(path.suffix == ".bin" for path in self.sets.values()):
            refuse_idle(self, "evaluate", ("far", "max_images"), "without a labelled set in evaluate.sets")
        return self
