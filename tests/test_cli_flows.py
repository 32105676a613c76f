"""The commands on living domains, each as the process a person would start."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import time

import pytest

from tests.conftest import no_process_is_left

MEMORY = ["--memory", "16M"]


@pytest.fixture
def guest(xsave):
    """A running built-in guest called g."""
    xsave.ok("create", "g", *MEMORY)
    return xsave


def domains(xsave, *options):
    return {d["name"]: d for d in xsave.json(*options, "list")}


def wait_for(condition, seconds=20):
    """Poll until the condition gives something true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def log(xsave, *options, name="g"):
    return xsave.ok(*options, "console", name, "--log").out


def test_list_has_the_keys_of_the_contract(guest):
    """The keys scripts depend on, in their order; the table names the guest too."""
    (domain,) = guest.json("list")
    keys = ["name", "domid", "host", "state", "vcpus", "memory_bytes", "min_mfn", "max_mfn"]
    keys.append("online_vcpus")
    assert list(domain) == keys
    assert (domain["name"], domain["host"], domain["state"]) == ("g", "localhost", "running")
    assert (domain["vcpus"], domain["memory_bytes"]) == (1, 16 << 20)
    assert 0 < domain["min_mfn"] < domain["max_mfn"]
    assert b"running" in guest.ok("list").out


def test_pause_and_unpause(guest):
    """The state says so, and a paused guest prints nothing."""
    assert guest.json("pause", "g")["state"] == "paused"
    before = log(guest)
    time.sleep(1.2)
    assert log(guest) == before
    assert guest.json("unpause", "g")["state"] == "running"


def test_memory_is_given_back_and_taken(xsave):
    """mem-set asks, list shows what the guest has; more than maxmem is refused, 2, and asks
    nothing."""
    xsave.ok("create", "g", *MEMORY, "--maxmem", "20M")
    for size in (12, 20):
        asked = xsave.json("mem-set", "g", f"{size}M")
        assert asked == {"name": "g", "target_bytes": size << 20}
        wait_for(lambda size=size: domains(xsave)["g"]["memory_bytes"] == size << 20)
    assert xsave("mem-set", "g", "21M").code == 2
    assert xsave("mem-set", "g", "2K").code == 2
    assert domains(xsave)["g"]["memory_bytes"] == 20 << 20


def test_less_maxmem_than_memory(xsave):
    """2, and nothing is made."""
    assert xsave("create", "g", *MEMORY, "--maxmem", "15M").code == 2
    assert domains(xsave) == {}


def test_vcpus_that_are_not_there(guest):
    """vcpu-set takes as many as there are, at least one."""
    assert guest.json("vcpu-set", "g", "1") == {"name": "g", "available_vcpus": 1}
    for number in ("2", "0", "-1", "many"):
        assert guest("vcpu-set", "g", number).code == 2


def test_who_has_ended_is_asked_nothing(xsave):
    """mem-set and vcpu-set of a guest that has powered off: 6."""
    xsave.ok("create", "g", *MEMORY, "--on-poweroff", "preserve")
    xsave.ok("shutdown", "g")
    wait_for(lambda: domains(xsave)["g"]["state"] == "shutdown")
    assert xsave("mem-set", "g", "12M").code == 6
    assert xsave("vcpu-set", "g", "1").code == 6


def test_a_name_is_taken_once(guest):
    """5, and the first domain is untouched."""
    assert guest("create", "g", *MEMORY).code == 5
    assert domains(guest)["g"]["domid"] == 1


def test_a_domain_can_be_named_by_its_domid(guest):
    guest.ok("destroy", "1")
    assert domains(guest) == {}


def test_destroy_leaves_nothing(guest, xsave_home):
    """All frames are free again and the process is gone."""
    guest.ok("destroy", "g")
    facts = guest.json("info")
    assert facts["free_frames"] == facts["nr_frames"] - facts["first_frame"]
    assert no_process_is_left(xsave_home)


def test_shutdown_asks_the_guest(guest):
    """The built-in guest powers off when asked, and the domain is gone then."""
    wait_for(lambda: b"TICK 1" in log(guest))
    guest.ok("shutdown", "g")
    wait_for(lambda: not domains(guest))


def test_console_follows_until_stdin_closes(guest):
    """Output goes to stdout as it is; talk stays on stderr."""
    wait_for(lambda: b"TICK 1" in log(guest))
    process = guest.start("console", "g", stdin=subprocess.PIPE)
    try:
        assert b"TICK" in process.stdout.readline()
    finally:
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert b"stdin closed" in err
    assert b"stdin closed" not in out


def test_console_follows_until_the_domain_ends(guest):
    process = guest.start("console", "g", stdin=subprocess.PIPE)
    wait_for(lambda: process.stdout.readline())
    guest.ok("destroy", "g")
    process.stdout.read()
    assert b"the domain ended" in process.stderr.read()
    assert process.wait(20) == 0
    process.communicate()


def test_console_log_in_json(guest):
    wait_for(lambda: b"TICK 1" in log(guest))
    assert "TICK 1" in guest.json("console", "g", "--log")["log"]


@pytest.mark.parametrize("compress", [[], ["--compress"], ["--compress-level", "3"]])
def test_save_and_restore(guest, tmp_path, compress):
    """The source is gone, the image is private, the restored guest ticks on."""
    image = tmp_path / "img"
    wait_for(lambda: b"TICK 1" in log(guest))
    result = guest.json("save", "g", image, *compress)
    assert result["nr_pages"] == 16 << 8
    assert result["image_bytes"] > 16 << 20
    assert stat.S_IMODE(image.stat().st_mode) == 0o600
    assert (image.read_bytes()[:4] == b"\x28\xb5\x2f\xfd") == bool(compress)
    assert domains(guest) == {}
    assert guest.json("restore", image, "--name", "h")["name"] == "h"
    wait_for(lambda: b"TICK" in log(guest, name="h"))
    assert b"TICK 1 " not in log(guest, name="h")


@pytest.mark.parametrize(
    ("option", "state"), [("-c", "running"), ("--leave-running", "running"), ("-p", "paused")]
)
def test_save_may_leave_the_domain(guest, tmp_path, option, state):
    """xl's short options mean the same."""
    guest.ok("save", "g", tmp_path / "img", option)
    assert domains(guest)["g"]["state"] == state


def test_restore_paused(guest, tmp_path):
    guest.ok("save", "g", tmp_path / "img")
    guest.ok("restore", tmp_path / "img", "-p")
    assert domains(guest)["g"]["state"] == "paused"
    assert log(guest) == b""


def test_through_a_pipe_to_another_host(guest):
    """`xsave save g - --json | xsave --host h restore -`: only the image is on stdout."""
    guest.ok("host", "add", "h", "--memory", "64M")
    save = guest.start("save", "g", "-", "--json")
    restore = guest.start("--host", "h", "restore", "-", "--json", stdin=save.stdout)
    save.stdout.close()
    out, err = restore.communicate(timeout=60)
    assert restore.returncode == 0, err
    assert json.loads(out)["host"] == "h"
    assert json.loads(save.stderr.read())["nr_pages"] == 16 << 8
    save.stderr.close()
    assert save.wait(20) == 0
    assert domains(guest) == {}
    assert list(domains(guest, "--host", "h")) == ["g"]
    assert [d["host"] for d in guest.json("list", "--all")] == ["h"]


def test_a_reader_that_leaves_keeps_the_guest(guest):
    """`xsave save g - | head -c 1000`: an I/O error for the save, the guest runs on."""
    save = guest.start("save", "g", "-")
    save.stdout.read(1000)
    save.stdout.close()
    said = save.stderr.read()
    save.stderr.close()
    assert save.wait(60) == 7
    assert said.count(b"\n") == 1
    assert domains(guest)["g"]["state"] == "running"


def test_a_disk_that_is_full_keeps_the_guest(guest):
    """7, and the guest runs on."""
    assert guest("save", "g", "/dev/full").code == 7
    assert domains(guest)["g"]["state"] == "running"


def test_a_paused_guest_cannot_be_saved(guest, tmp_path):
    """6 at once, no file, still paused."""
    guest.ok("pause", "g")
    assert guest("save", "g", tmp_path / "img").code == 6
    assert list(tmp_path.iterdir()) == []
    assert domains(guest)["g"]["state"] == "paused"


def test_restore_under_a_name_that_is_taken(guest, tmp_path):
    """5, and only the first is there."""
    guest.ok("save", "g", tmp_path / "img", "-c")
    assert guest("restore", tmp_path / "img").code == 5
    assert list(domains(guest)) == ["g"]


def test_migrate(guest):
    """The only domain of the host needs no name; it runs there and no longer here."""
    guest.ok("host", "add", "h", "--memory", "64M")
    wait_for(lambda: b"TICK 1" in log(guest))
    events = [
        json.loads(line) for line in guest.ok("migrate", "--to", "h", "--json").out.splitlines()
    ]
    answer = events[-1]
    assert (answer["name"], answer["host"], answer["outcome"]) == ("g", "h", "migrated")
    assert answer["downtime_ns"] > 0
    assert answer["guest_downtime_ns"] > 0
    assert 0 < answer["freeze_ns"] < answer["total_ns"]
    assert answer["total_ns"] > answer["downtime_ns"]
    assert answer["bytes_sent"] > 0
    assert answer["nr_rounds"] == 1 + sum(event.get("event") == "round" for event in events)
    assert [event["action"] for event in events if event.get("event") == "decided"][-1] == (
        "stop-and-copy"
    )
    assert domains(guest) == {}
    assert domains(guest, "--host", "h")["g"]["state"] == "running"
    wait_for(lambda: b"TICK" in log(guest, "--host", "h"))


def test_migrate_that_is_cancelled(guest):
    """6, the last line says what became of it, and the guest runs on here."""
    guest.ok("host", "add", "h", "--memory", "64M")
    options = ["--downtime", "1", "--timeout", "0.01", "--on-timeout", "cancel"]
    result = guest("migrate", "g", "--to", "h", *options, "--json")
    assert result.code == 6
    answer = json.loads(result.out.splitlines()[-1])
    assert (answer["outcome"], answer["exit_code"]) == ("cancelled", 6)
    assert "0.01 s are over" in result.err
    assert domains(guest)["g"]["state"] == "running"
    assert domains(guest, "--host", "h") == {}


@pytest.mark.parametrize("log_kind", ["compare", "auto"])
def test_dry_run_of_a_migration(guest, monkeypatch, log_kind):
    """It says how it would go, and nothing moves."""
    monkeypatch.setenv("XSAVE_DIRTY_LOG", log_kind)
    guest.ok("host", "add", "h", "--memory", "64M")
    answer = guest.json("migrate", "g", "--to", "h", "--dry-run")
    assert answer["outcome"] == "stop-and-copy"
    assert 0 < answer["downtime_ns"] < answer["total_ns"]
    assert log_kind in ("auto", answer["dirty_log"])
    assert domains(guest)["g"]["state"] == "running"
    assert domains(guest, "--host", "h") == {}
    assert b"downtime" in guest.ok("migrate", "g", "--to", "h", "--dry-run", "--compress").out


@pytest.mark.parametrize("number", [2, 3, 4, 6])
def test_ctrl_c_of_a_migration(guest, number):
    """SIGINT behind one of its events: 130, and the guest runs on here, nothing is there; or it
    came too late and it runs there."""
    guest.ok("host", "add", "h", "--memory", "64M")
    with guest.start("migrate", "g", "--to", "h", "--json") as process:
        for _ in range(number):
            process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read().splitlines()
        code = process.wait(60)
    here, there = domains(guest), domains(guest, "--host", "h")
    if code == 130:
        assert json.loads(rest[-1])["outcome"] == "interrupted"
        assert here["g"]["state"] == "running"
        assert there == {}
    else:
        assert (code, here) in ((0, {}), (9, here))
        assert code == 9 or there["g"]["state"] == "running"


def test_options_of_migrate_exclude_each_other(guest, monkeypatch):
    """2, before anything happens."""
    assert guest("migrate", "g", "--to", "localhost", "--no-live", "--dry-run").code == 2
    monkeypatch.setenv("XSAVE_DIRTY_LOG", "dbits")
    assert guest("migrate", "g", "--to", "localhost").code == 2


def test_migrate_wants_a_name_where_there_are_two(guest):
    guest.ok("host", "add", "h", "--memory", "64M")
    guest.ok("create", "second", *MEMORY)
    result = guest("migrate", "--to", "h")
    assert result.code == 2
    assert "g, second" in result.err


def test_migrate_to_where_it_is(guest):
    assert guest("migrate", "g", "--to", "localhost").code == 2


def test_migrate_to_a_host_without_room(guest):
    """8 or 7 at the far end is an error here, and the guest runs on here."""
    guest.ok("host", "add", "h", "--memory", "20M")
    guest.ok("--host", "h", "create", "other", "--memory", "8M")
    result = guest("migrate", "g", "--to", "h")
    assert result.code in (7, 8)
    assert domains(guest)["g"]["state"] == "running"
    assert list(domains(guest, "--host", "h")) == ["other"]


def test_progress_of_a_save_as_json_lines(guest, tmp_path):
    """--progress json: stages of the freeze and suspend by name, pages, the end."""
    result = guest.ok("-q", "--progress", "json", "save", "g", tmp_path / "img")
    events = [json.loads(line) for line in result.err.splitlines()]
    assert {"stage", "pages", "finished"} == {event["event"] for event in events}
    assert {"freeze", "suspend"} <= {event.get("name") for event in events}
    assert events[-1]["nr_pages"] == 16 << 8


def test_ctrl_c_of_a_save_leaves_the_guest(guest, tmp_path):
    """130, no file, and the guest runs on."""
    os.mkfifo(tmp_path / "pipe")
    save = guest.start("save", "g", tmp_path / "pipe")
    fd = os.open(tmp_path / "pipe", os.O_RDONLY)
    try:
        os.read(fd, 1000)  # it writes, and now waits for us
        save.send_signal(signal.SIGINT)
        _, err = save.communicate(timeout=60)
    finally:
        os.close(fd)
    assert save.returncode == 130
    assert err.decode().splitlines()[-1] == "xsave: error: interrupted"
    wait_for(lambda: domains(guest)["g"]["state"] == "running")


def test_deterministic_guests_give_the_same_image(xsave, tmp_path):
    """The same seed on hosts with other frames: the same bytes."""
    for name, seed in (("a", "1"), ("b", "2")):
        xsave.ok("host", "add", name, "--memory", "64M", "--seed", seed)
        xsave.ok("--host", name, "create", "g", *MEMORY, "--deterministic", "7")
        xsave.ok("--host", name, "save", "g", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_real_image_this_cpu_cannot_take(xsave, xen_image):
    """4, with the features named; --cpu-mismatch allow takes it, and the guest counts on."""
    image = xen_image("pv-micro-1cpu.img")
    refused = xsave("restore", image)
    assert refused.code == 4
    assert "AVX" in refused.err
    assert domains(xsave) == {}
    name = xsave.json("restore", image, "--cpu-mismatch", "allow")["name"]
    wait_for(lambda: b"TICK 5" in log(xsave, name=name), seconds=60)


def test_another_file_for_a_disk(xsave, tmp_path):
    """restore --disk attaches it; without it the missing file is named and nothing begins, and
    what is no VDEV=FILE is a usage error."""
    disk, image = tmp_path / "disk.img", tmp_path / "img"
    disk.write_bytes(bytes(1 << 20))
    xsave.ok("create", "g", *MEMORY, "--disk", f"{disk},raw,xvda,w")
    wait_for(lambda: b"TICK" in log(xsave))
    xsave.ok("save", "g", image)
    other = disk.rename(tmp_path / "other.img")
    missing = xsave("restore", image)
    assert missing.code == 7
    assert f"{disk}: No such file or directory" in missing.err
    for words in (["xvda"], [f"xvdb={other}"], [f"xvda={other}", f"xvda={other}"]):
        wrong = xsave("restore", *(word for text in words for word in ("--disk", text)), image)
        assert wrong.code == 2
    assert domains(xsave) == {}
    xsave.ok("restore", "--disk", f"xvda={other}", image)
    assert domains(xsave)["g"]["state"] == "running"
