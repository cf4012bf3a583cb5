"""Segment 3D medical scans in function space: ask a network which structure is at any point.

scan = ossnet.read("scan.nii.gz")
model = ossnet.load("runs/liver")
labels = model.field(scan).segment()
labels.save("scan_seg.nii.gz")
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ossnet.errors import InputError, OssnetError, ResourceError
    from ossnet.evaluation.scoring import evaluate
    from ossnet.field.cohort.run import segment_folder
    from ossnet.field.components import without_islands
    from ossnet.field.field import Field
    from ossnet.field.imported import import_released
    from ossnet.field.mesh.extract import save_mesh
    from ossnet.field.model import Model
    from ossnet.field.octree.refinement import Refinement, refine
    from ossnet.field.octree.tree import Octree
    from ossnet.files.dicom_seg import write_dicom_seg
    from ossnet.files.reading import read_labels
    from ossnet.files.reading import read_volume as read
    from ossnet.volume import LabelMap, Volume

    load = Model.load

_WHERE = {
    "Field": "ossnet.field.field:Field",
    "InputError": "ossnet.errors:InputError",
    "LabelMap": "ossnet.volume:LabelMap",
    "Model": "ossnet.field.model:Model",
    "Octree": "ossnet.field.octree.tree:Octree",
    "OssnetError": "ossnet.errors:OssnetError",
    "Refinement": "ossnet.field.octree.refinement:Refinement",
    "ResourceError": "ossnet.errors:ResourceError",
    "Volume": "ossnet.volume:Volume",
    "evaluate": "ossnet.evaluation.scoring:evaluate",
    "import_released": "ossnet.field.imported:import_released",
    "load": "ossnet.field.model:Model.load",
    "read": "ossnet.files.reading:read_volume",
    "read_labels": "ossnet.files.reading:read_labels",
    "refine": "ossnet.field.octree.refinement:refine",
    "save_mesh": "ossnet.field.mesh.extract:save_mesh",
    "segment_folder": "ossnet.field.cohort.run:segment_folder",
    "without_islands": "ossnet.field.components:without_islands",
    "write_dicom_seg": "ossnet.files.dicom_seg:write_dicom_seg",
}

__all__ = [
    "Field",
    "InputError",
    "LabelMap",
    "Model",
    "Octree",
    "OssnetError",
    "Refinement",
    "ResourceError",
    "Volume",
    "evaluate",
    "import_released",
    "load",
    "read",
    "read_labels",
    "refine",
    "save_mesh",
    "segment_folder",
    "without_islands",
    "write_dicom_seg",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("ossnet")
    # On first use: reading a header should not wait for torch.
    if name not in _WHERE:
        raise AttributeError(f"module 'ossnet' has no attribute {name!r}")
    module, _, path = _WHERE[name].partition(":")
    value: Any = import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
