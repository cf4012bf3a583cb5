"""What `model.json` must say, and of what else it says the parts that are read again."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ossnet.data.preparation import Preparation

Size = Annotated[float, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class _Data(_Part):
    name: str | None = None


class _Extents(_Part):
    """Of the training scans, in mm per axis."""

    smallest: tuple[Size, Size, Size]
    largest: tuple[Size, Size, Size]


class _Network(_Part):
    patch_shape: tuple[int, int, int] | None = None


class _Settings(_Part):
    """Those of the training; the groups without a form of their own are for people."""

    network: _Network = _Network()
    data: dict[str, Any] = {}
    augmentation: dict[str, Any] = {}
    optimiser: dict[str, Any] = {}
    schedule: dict[str, Any] = {}


class Description(_Part):
    """A model without its weights. What is optional is metadata, of which there may be more (`Model.metadata`)."""

    family: str
    network: dict[str, Any]
    preparation: Preparation
    labels: dict[int, str]
    channels: tuple[str, ...] = ()
    data: _Data = _Data()
    settings: _Settings = _Settings()
    extent_mm: _Extents | None = None
    surface_mm2: Size | None = None
    piece_mm: Size | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    regions: dict[str, tuple[int, ...]] = {}
    label_values: dict[int, Annotated[int, Field(gt=0)]] = {}
    about: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    whole_scans: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    use: str = ""
