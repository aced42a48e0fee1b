"""The section ``compat``: each method of compatible training, and each mode of LCE, with the keys that it has.

Weights are in (1 − cos) units, independent of D. The paper's alignment weight λ_a multiplies a mean over dimensions
too: its λ_a is ``alignment_weight · D / 2`` (λ_a = 100 at D = 2048 is 0.098 here, at D = 64 it is 3.1).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field, model_validator

from trainer.config import Section, Variants, refuse_idle
from trainer.networks.config import AnyTransform, LinearConfig, OrthogonalConfig, RbtConfig

_METHOD = "how the new model is made compatible with a deployed one; none: it is not"
_MODE = "where the two models are compared: in one space (direct), or through maps between their spaces"
_BANK = "centre bank of the old model (`lce centers …`); its folder"
_NAMES_OLD = "centre bank of the old model: it names that model in what is exported"


class MethodConfig(Section):
    """A method of compatible training; the base of its kinds.

    Attributes:
        bank: where the method takes one; None: it is not given, or the method takes none.
    """

    method: str
    bank: Path | None = None

    @property
    def label(self) -> str:
        """How a model card names what made the model compatible: LCE's mode, or the method."""
        return self.method

    @property
    def directions(self) -> tuple[bool, bool]:
        """Whether the method trains T₂₁ (new → old) and T₁₂ (old → new)."""
        return False, False

    @model_validator(mode="after")
    def _has_an_effect(self) -> "MethodConfig":
        every = ("alignment_weight", "boundary_weight", "contrastive_weight", "weight", "mix_share")
        weights = [key for key in every if key in type(self).model_fields]
        if weights and not any(getattr(self, key) for key in weights):
            names = " and ".join(f"compat.{key}" for key in weights)
            raise ValueError(f"{names}: 0 trains an incompatible model; set one above 0, or compat.method=none")
        return self


class NoMethodConfig(Section):
    """A model of its own."""

    method: Literal["none"] = Field("none", description=_METHOD)


class LceConfig(MethodConfig):
    """LCE (Meng et al., ICCV 2021); the base of its modes."""

    method: Literal["lce"] = Field("lce", description=_METHOD)
    mode: str
    alignment_weight: float = Field(0.4, ge=0, description="λ_a in (1 − cos) units")
    boundary_weight: float = Field(1.0, ge=0, description="λ_b")
    authors_formula: bool = Field(
        False, description="the authors' terms: T's output and the boundary's embeddings are not made unit"
    )

    @property
    def label(self) -> str:
        """See :attr:`MethodConfig.label`."""
        return self.mode


class LceDirectConfig(LceConfig):
    """New and old embeddings share one space."""

    mode: Literal["direct"] = Field("direct", description=_MODE)
    bank: Path = Field(description=_BANK)
    centers: Literal["device", "host"] = Field(
        "device", description="where the old centres lie; host: a step's rows are copied to the device"
    )

    @model_validator(mode="after")
    def _bounded(self) -> "LceDirectConfig":
        if not self.boundary_weight:
            refuse_idle(self, "compat", ("authors_formula",), "in mode direct with compat.boundary_weight=0")
        return self


class LceMapsConfig(LceConfig):
    """Base of the modes that train maps between the two spaces."""

    transform: AnyTransform = Field(RbtConfig(), description="the map T between the embedding spaces")


class LceTransformedConfig(LceMapsConfig):
    """New and old embeddings have spaces of their own, and maps between them are trained along."""

    mode: Literal["backward", "forward", "both"] = Field("both", description=_MODE)
    bank: Path = Field(description=_BANK)

    @property
    def directions(self) -> tuple[bool, bool]:
        """See :attr:`MethodConfig.directions`."""
        return self.mode != "forward", self.mode != "backward"


class LceCrossConfig(LceMapsConfig):
    """Two finished models: only the maps between their spaces are trained."""

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("old_embeddings", "old_model", "new_bank"),)

    mode: Literal["cross-model"] = Field("cross-model", description=_MODE)
    bank: Path | None = Field(None, description=f"{_BANK}; the boundary needs it")
    old_embeddings: Path | None = Field(None, description="old embeddings by record (.npy, float32, N × D1)")
    old_model: Path | None = Field(
        None, description="or the old model (model folder, run folder, .onnx), run along on the batch's images"
    )
    new_embeddings: Path | None = Field(None, description="new embeddings by record (.npy, float32, N × D2)")
    new_model: Path | None = Field(
        None, description="the new model, run along where new_embeddings is not set; exported with the maps"
    )
    new_bank: Path | None = Field(None, description="centres of the new model, to align with those of bank")
    maps: Literal["both", "t21", "t12"] = Field("both", description="which maps are trained: t21 is new → old")
    contrastive_weight: float = Field(
        0.0, ge=0, description="weight of the supervised contrastive loss of T₂₁, or of T₁₂ alone, within a batch"
    )
    contrastive_temperature: float = Field(0.1, gt=0, description="its temperature, by which cosines are divided")
    orthogonal_weight: float = Field(
        0.0, ge=0, description="weight of the λ-orthogonal penalty of a linear T₂₁ (the authors': 1)"
    )
    orthogonal_threshold: float = Field(
        1.0, ge=0, description="its λ: how far T₂₁ may be from orthogonal, in the Frobenius norm of its Gram matrix − 1"
    )
    noise: float = Field(
        0.0,
        ge=0,
        le=10,
        description="length of the Gaussian noise that the maps' inputs, of length 1, get while they train",
    )
    distance: bool = Field(
        False,
        description="learn how far T₁₂ of an old embedding is from the new one, for `lce gallery upgrade` by distance",
    )

    @property
    def directions(self) -> tuple[bool, bool]:
        """See :attr:`MethodConfig.directions`."""
        return self.maps != "t12", self.maps != "t21"

    @model_validator(mode="after")
    def _inputs(self) -> "LceCrossConfig":
        if self.old_embeddings is not None and self.old_model is not None:
            raise ValueError("compat.old_embeddings, compat.old_model: both are given; mode cross-model takes one")
        if self.new_bank is not None:
            pairs = "with compat.new_bank, whose centres are aligned with those of compat.bank"
            refuse_idle(self, "compat", ("old_embeddings", "old_model"), pairs)
        if self.bank is None:
            if not (self.alignment_weight or self.contrastive_weight):
                raise ValueError(
                    "compat.alignment_weight: 0 trains nothing without compat.bank, which the boundary needs; set one"
                )
            if self.boundary_weight:
                refuse_idle(self, "compat", ("boundary_weight",), "without compat.bank")
        return self

    @model_validator(mode="after")
    def _terms(self) -> "LceCrossConfig":
        if self.new_bank is not None:
            of_images = {key: getattr(self, key) for key in ("contrastive_weight", "noise", "distance")}
            given = [f"compat.{key}" for key, value in of_images.items() if value]
            if given:
                off = " ".join(f"{key}={'false' if key.endswith('distance') else 0}" for key in given)
                raise ValueError(
                    f"{', '.join(given)}: of the two embeddings of each image, and compat.new_bank has centres "
                    f"aligned; remove one of them, or put {off} over a file that sets it"
                )
        if self.distance and self.maps == "t21":
            raise ValueError("compat.distance: is of T₁₂, which compat.maps = t21 does not train; remove one of them")
        if self.orthogonal_weight and (self.maps == "t12" or not isinstance(self.transform, LinearConfig)):
            raise ValueError(
                f"compat.orthogonal_weight: is of a linear T₂₁; compat.maps is {self.maps}, compat.transform.name "
                f"{self.transform.name}: set compat.transform.name=linear and compat.maps=both or t21"
            )
        for key in ("contrastive_temperature", "orthogonal_threshold"):
            weight = f"{key.partition('_')[0]}_weight"
            if getattr(self, key) != type(self).model_fields[key].default and not getattr(self, weight):
                raise ValueError(f"compat.{key} has no effect with compat.{weight} = 0: set that too, or remove it")
        return self


class WithOldConfig(MethodConfig):
    """Base of the methods that compare an image with its old embedding."""

    old_embeddings: Path | None = Field(None, description="old embeddings by record (.npy, float32, N × D1)")
    old_model: Path | None = Field(
        None, description="or the old model (model folder, run folder, .onnx), run along on the batch's images"
    )

    @model_validator(mode="after")
    def _one(self) -> "WithOldConfig":
        given = (self.old_embeddings is not None) + (self.old_model is not None)
        if given != 1:
            raise ValueError(
                f"compat.old_embeddings, compat.old_model: compat.method {self.method} needs one of them, {given} given"
            )
        return self


class BctConfig(MethodConfig):
    """BCT: the old classifier judges the new embeddings as well."""

    method: Literal["bct"] = Field("bct", description=_METHOD)
    bank: Path = Field(description=_BANK)
    weight: float = Field(1.0, ge=0, description="the weight of the method's loss")
    old_margin: float = Field(0.0, ge=0, description="cosine margin before the old classifier")


class UniBctConfig(MethodConfig):
    """UniBCT: BCT with prototypes refined from the old embeddings."""

    method: Literal["unibct"] = Field("unibct", description=_METHOD)
    bank: Path | None = Field(None, description=_NAMES_OLD)
    old_embeddings: Path = Field(description="old embeddings by record (.npy, float32, N × D1)")
    weight: float = Field(1.0, ge=0, description="the weight of the method's loss")
    old_margin: float = Field(0.0, ge=0, description="cosine margin before the old classifier")


class NdppConfig(MethodConfig):
    """NDPP: BCT with old centres that are moved away from their near neighbours."""

    method: Literal["ndpp"] = Field("ndpp", description=_METHOD)
    bank: Path = Field(description=_BANK)
    weight: float = Field(1.0, ge=0, description="the weight of the method's loss")
    old_margin: float = Field(0.0, ge=0, description="cosine margin before the old classifier")
    neighbours: int = Field(10, ge=1, description="nearest centres that an old centre is moved away from")
    push: float = Field(0.5, ge=0, description="how far an old centre is moved, in units of its mean offset")


class Bt2Config(WithOldConfig):
    """BT²: dimensions that the old gallery ignores, and a learned change of basis."""

    method: Literal["bt2"] = Field("bt2", description=_METHOD)
    bank: Path = Field(description=_BANK)
    weight: float = Field(1.0, ge=0, description="the weight of the method's loss")
    old_margin: float = Field(0.0, ge=0, description="cosine margin before the old classifier")

    @property
    def directions(self) -> tuple[bool, bool]:
        """See :attr:`MethodConfig.directions`."""
        return True, False

    @property
    def transform(self) -> AnyTransform:
        """The kind of map that T₂₁ is."""
        return OrthogonalConfig(name="orthogonal")


class FrozenConfig(MethodConfig):
    """The classifier's rows of classes with an old centre stay there."""

    method: Literal["frozen"] = Field("frozen", description=_METHOD)
    bank: Path = Field(description=_BANK)


class L2Config(WithOldConfig):
    """L2: regression to the old embedding of the same image."""

    method: Literal["l2"] = Field("l2", description=_METHOD)
    bank: Path | None = Field(None, description=_NAMES_OLD)
    weight: float = Field(1.0, ge=0, description="the weight of the method's loss")


class AdvBctConfig(WithOldConfig):
    """AdvBCT: an adversarial discriminator and an elastic boundary."""

    method: Literal["advbct"] = Field("advbct", description=_METHOD)
    bank: Path = Field(description=_BANK)
    weight: float = Field(1.0, ge=0, description="the weight of the reversed gradient of the discriminator")
    boundary_weight: float = Field(1.0, ge=0, description="the weight of the elastic boundary")


class MixBctConfig(WithOldConfig):
    """MixBCT: old embeddings stand in for some of the batch before the head."""

    method: Literal["mixbct"] = Field("mixbct", description=_METHOD)
    bank: Path = Field(description=_BANK)
    mix_share: float = Field(0.3, ge=0, le=1, description="share of the batch that old embeddings stand in for")


class FctConfig(WithOldConfig):
    """FCT: a map from old to new embeddings, trained next to an independent model."""

    method: Literal["fct"] = Field("fct", description=_METHOD)
    bank: Path | None = Field(None, description=_NAMES_OLD)
    weight: float = Field(1.0, ge=0, description="the weight of the method's loss")
    transform: AnyTransform = Field(RbtConfig(), description="the map T from old to new embeddings")

    @property
    def directions(self) -> tuple[bool, bool]:
        """See :attr:`MethodConfig.directions`."""
        return False, True


AnyMethod: TypeAlias = Annotated[
    NoMethodConfig
    | LceDirectConfig
    | LceTransformedConfig
    | LceCrossConfig
    | BctConfig
    | UniBctConfig
    | NdppConfig
    | Bt2Config
    | FrozenConfig
    | L2Config
    | AdvBctConfig
    | MixBctConfig
    | FctConfig,
    Variants(method="none", mode="direct"),
]


def check_together(methods: Sequence[MethodConfig]) -> None:
    """Refuse methods that make no sense in one run. Raises :class:`ValueError`.

    All of them are for one old model, which each method names as if it stood alone.
    """
    if len(methods) < 2:
        return
    names = [one.method for one in methods]
    for one in methods:
        if names.count(one.method) > 1:
            raise ValueError(
                f"compat: method {one.method} is given more than once; give it once, with the whole weight"
            )
        if isinstance(one, LceCrossConfig):
            others = ", ".join(name for name in names if name != one.method)
            raise ValueError(f"compat: lce with mode cross-model trains no network, on which {others} could act")
    for number, direction in enumerate(("T₂₁", "T₁₂")):
        both = [one.method for one in methods if one.directions[number]]
        if len(both) > 1:
            raise ValueError(f"compat: {' and '.join(both)} train the same map {direction}; give one of them")
    direct = [one.label for one in methods if not any(one.directions)]
    mapped = [one.label for one in methods if any(one.directions)]
    if direct and mapped:
        raise ValueError(
            f"compat: {', '.join(direct)} compares new with old embeddings as they are, {', '.join(mapped)} through "
            "maps; give methods of one kind"
        )
    pairs = [one.method for one in methods if isinstance(one, WithOldConfig) and not isinstance(one, MixBctConfig)]
    if pairs and "mixbct" in names:
        raise ValueError(
            f"compat: mixbct puts old embeddings in place of new ones, and {', '.join(pairs)} would compare these with "
            "themselves; give one of them"
        )
    for keys in (("bank",), ("old_embeddings", "old_model")):
        given = {one.method: tuple(getattr(one, key, None) for key in keys) for one in methods}
        named = {name: values for name, values in given.items() if any(values)}
        if len(set(named.values())) > 1:
            shown = "; ".join(f"{name} has {_shown(keys, values)}" for name, values in named.items())
            raise ValueError(f"compat: all methods must be for one old model, from the same files: {shown}")


def _shown(keys: Sequence[str], values: Sequence[Path | None]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in zip(keys, values, strict=True) if value is not None)
