"""The net that these tests run in: a wrong shape is caught, with the name of the argument."""

import numpy as np
import pytest

from ossnet.volume import transform


def test_a_wrong_shape_fails() -> None:
    with pytest.raises(Exception, match="affine") as caught:
        transform(np.zeros((5, 3)), np.eye(3))
    assert "4 4" in str(caught.value)
