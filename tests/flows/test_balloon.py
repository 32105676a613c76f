"""A guest that gave memory back keeps to that after a restore."""

from __future__ import annotations

import json

import pytest

from tests.flows.flow import destroy, restore
from xsave.guest.xen.domctl import Domctl


@pytest.mark.parametrize(
    ("target", "pages"), [(4096, 1024), (None, None), (-4, None), ("4096", None)]
)
def test_the_target_comes_from_the_image(
    xsave, host, builtin_image, monkeypatch, tmp_path, target, pages
):
    """restore begins a domain with the image's target_memkb; without a number, with all."""
    seen = []
    begin = Domctl.begin

    def spy(self, **arguments):
        seen.append(arguments)
        begin(self, **arguments)

    monkeypatch.setattr(Domctl, "begin", spy)
    config = xsave.json("image", "info", builtin_image)["config"]
    config["b_info"]["target_memkb"] = target
    (tmp_path / "config").write_text(json.dumps(config))
    xsave.ok("image", "convert", "--config", tmp_path / "config", builtin_image, tmp_path / "img")
    restore(host, tmp_path / "img", paused=True)
    assert [(a["target_pages"], a["max_pages"]) for a in seen] == [(pages, 2048)]
    destroy(host)
