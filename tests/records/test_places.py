"""Places that a reader names, as far as no command is needed to judge them."""

from __future__ import annotations

import pytest

from mnemoscope.errors import UsageError
from mnemoscope.records.places import require_place_for_file, require_place_for_folder, require_place_for_lines


@pytest.mark.parametrize("require", [require_place_for_file, require_place_for_folder, require_place_for_lines])
def test_a_place_below_thousands_of_new_folders_is_refused(require, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    require("a/" * 50 + "x")
    with pytest.raises(UsageError, match=r"1,501 folders would have to be made for it, and at most 100 are"):
        require("a/" * 1500 + "x")
