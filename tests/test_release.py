"""What a release consists of. `tests/release_check.py` looks at more of it, and takes minutes."""

from pathlib import Path

import pytest

from tests import release_check


def test_the_wheel_has_all_files_and_no_others(tmp_path: Path) -> None:
    """As the build backend makes it, and again from the sdist. Installed elsewhere, with the packages that are here, it
    plans and trains."""
    wheel = release_check.check_builds(tmp_path)
    names = set(release_check.contents(wheel))
    assert {"bigmac_lightning/py.typed", "bigmac_lightning/schedule/viewer/timeline.html"} <= names
    assert {"bigmac_lightning/models/multimodal_lm.py", "bigmac_lightning/datamodules/multimodal.py"} <= names
    with pytest.raises(ValueError, match=r"missing in the wheel: \['bigmac_lightning/py\.typed'\]; too many: \[\]"):
        release_check.check_contents(names - {"bigmac_lightning/py.typed"})
    with pytest.raises(ValueError, match=r"too many: \['tests/toy\.py'\]"):
        release_check.check_contents({*names, "tests/toy.py"})
    release_check.check_use(wheel, tmp_path, borrow=True)
