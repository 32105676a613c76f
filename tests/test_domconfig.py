"""The configuration in an image: whatever it is, a restore reads it without a surprise."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xsave.domconfig import read_config, renamed, with_disk_files
from xsave.errors import ImageError, UsageError

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["c_info", "b_info", "xsave", "name", "max_memkb", "max_vcpus", "disks", "vdev"]
            ),
            inner,
        )
    ),
    max_leaves=9,
)


@given(anything)
def test_what_is_odd_counts_as_absent(config):
    """Any JSON gives a configuration of the right types."""
    found = read_config(json.dumps(config).encode())
    assert isinstance(found.name, str)
    assert isinstance(found.nr_vcpus, int)
    assert found.pages is None or found.pages > 0


@pytest.mark.parametrize(
    ("listed", "found"),
    [([0, 2], {0, 2}), ([], None), (None, None), ("0-3", None), ([0, "1", None, True], {0})],
)
def test_available_vcpus(listed, found):
    """A list of numbers; whatever else says nothing."""
    text = json.dumps({"b_info": {"avail_vcpus": listed}}).encode()
    assert read_config(text).available_vcpus == found


@given(anything, st.text(min_size=1, max_size=9))
def test_a_name_is_changed_and_nothing_else(config, name):
    """The new text has the name and all else of the old one; with the old name it is the same."""
    text = json.dumps(config).encode()
    try:
        new = renamed(text, name)
    except ImageError as error:
        assert "c_info" in str(error)
        return
    assert read_config(new).name == name
    assert renamed(new, name) is new
    if isinstance(config, dict):
        rest = {key: value for key, value in config.items() if key not in ("c_info", "b_info")}
        assert rest.items() <= json.loads(new).items()


@pytest.mark.parametrize("text", [b"{", b"[" * 100_000, b"\xff", b'{"c_info": nope}'])
def test_what_is_no_json_is_refused(text):
    """One error that says where the configuration is."""
    with pytest.raises(ImageError, match=r"no JSON.*offset"):
        read_config(text)


def test_a_disk_gets_another_file():
    """That one, by its name in the guest, and nothing else changes; no file, not a byte."""
    disks = [{"vdev": "xvda", "pdev_path": "/a", "format": "qcow2"}, {"vdev": "xvdb"}]
    text = json.dumps({"c_info": {"name": "g"}, "disks": disks}).encode()
    assert with_disk_files(text, {}) is text
    new = json.loads(with_disk_files(text, {"xvda": "/b"}))
    assert new == {"c_info": {"name": "g"}, "disks": [disks[0] | {"pdev_path": "/b"}, disks[1]]}


@given(anything)
def test_a_disk_that_is_not_there_gets_no_file(config):
    """Whatever the configuration is, the error names the disk."""
    with pytest.raises(UsageError, match="--disk xvdq: the image has no such disk"):
        with_disk_files(json.dumps(config).encode(), {"xvdq": "/b"})
