"""What the published client of the API that /v1 follows does, with a daemon at WRENN_BASE_URL.

It is given a directory in the sandbox that is empty.
"""

import asyncio
import sys
from datetime import timedelta

import wrenn
from wrenn import Capsule, WrennClient
from wrenn.async_capsule import AsyncCapsule
from wrenn.exceptions import (
    WrennAgentError,
    WrennConflictError,
    WrennNotFoundError,
    WrennValidationError,
)
from wrenn.models import Status

DIRECTORY = sys.argv[1]


def refused(error, act):
    try:
        act()
    except error as told:
        assert told.code and str(told), told
        return told
    raise AssertionError(f"{error.__name__} was expected")


def life(client):
    made = Capsule.create(vcpus=1, memory_mb=256, timeout=600)
    assert made.info.status == Status.running and made.info.template == "minimal"
    assert (made.info.vcpus, made.info.memory_mb, made.info.timeout_sec) == (1, 256, 600)
    made.wait_ready()
    assert made.is_running()
    assert [one.id for one in Capsule.list()] == [made.capsule_id]
    made.ping()
    before = client.capsules.get(made.capsule_id)
    assert before.last_active_at.tzinfo is not None and before.created_at <= before.started_at
    assert made.pause().status == Status.paused
    refused(WrennConflictError, lambda: made.commands.run("true"))
    found = Capsule.connect(made.capsule_id)
    assert found.is_running(), "it is resumed by connecting"
    refused(WrennConflictError, made.resume)
    made.destroy()
    assert client.capsules.get(made.capsule_id).status == Status.stopped
    assert Capsule.list() == []
    refused(WrennNotFoundError, lambda: client.capsules.get("sb-00000000"))
    refused(WrennNotFoundError, lambda: client.capsules.destroy("sb-00000000"))
    refused(WrennValidationError, lambda: client.capsules.create(template="no-such"))
    refused(WrennValidationError, lambda: client.capsules.create(vcpus=1000))


def commands(capsule):
    done = capsule.commands.run("echo out; echo err >&2; exit 3")
    assert (done.stdout, done.stderr, done.exit_code) == ("out\n", "err\n", 3)
    assert done.duration_ms >= 0
    done = capsule.commands.run("echo $A; pwd", envs={"A": "b c"}, cwd=DIRECTORY)
    assert done.stdout == f"b c\n{DIRECTORY}\n"
    done = capsule.commands.run(r"printf '\377x'")
    assert done.stdout == "\ufffdx"
    refused(WrennAgentError, lambda: capsule.commands.run("sleep 30", timeout=1))

    events = list(capsule.commands.stream("echo one; echo two >&2; exit 4"))
    assert (events[0].type, events[-1].type) == ("start", "exit")
    assert events[0].pid > 0 and events[-1].exit_code == 4
    # Which of two streams is read first is nobody's promise.
    said = sorted((event.type, event.data) for event in events[1:-1])
    assert said == [("stderr", "two\n"), ("stdout", "one\n")], said
    events = list(capsule.commands.stream("printf", args=["%s-%s", "a", "b"]))
    assert [event.data for event in events if event.type == "stdout"] == ["a-b"]

    server = capsule.commands.run(
        "echo begun; exec sleep 1000", background=True, tag="server", cwd=DIRECTORY
    )
    assert (server.tag, server.capsule_id) == ("server", capsule.capsule_id) and server.pid > 0
    nameless = capsule.commands.run("exec sleep 1000", background=True)
    assert nameless.tag and nameless.tag != server.tag
    running = capsule.commands.list()
    assert [(one.pid, one.tag) for one in running] == [
        (server.pid, "server"),
        (nameless.pid, nameless.tag),
    ]
    assert running[0].cmd == "/bin/sh" and running[0].args[0] == "-c"
    followed = capsule.commands.connect(server.pid)
    assert next(followed).type == "start"
    assert next(followed).data == "begun\n"
    for one in running:
        capsule.commands.kill(one.pid)
    last = list(followed)[-1]
    assert (last.type, last.exit_code) == ("exit", 137)
    assert capsule.commands.list() == []
    refused(WrennNotFoundError, lambda: capsule.commands.kill(server.pid))


def files(capsule):
    path = f"{DIRECTORY}/text"
    capsule.files.write(path, "gr\u00fcn\n")
    assert capsule.files.read(path) == "gr\u00fcn\n"
    content = bytes(range(256)) * 4096
    capsule.files.write(f"{DIRECTORY}/bytes", content)
    assert capsule.files.read_bytes(f"{DIRECTORY}/bytes") == content
    capsule.files.upload_stream(f"{DIRECTORY}/stream", (content for _ in range(3)))
    assert b"".join(capsule.files.download_stream(f"{DIRECTORY}/stream")) == content * 3
    made = capsule.files.make_dir(f"{DIRECTORY}/a/b")
    assert made.name == "b" and made.type.value == "directory"
    again = capsule.files.make_dir(f"{DIRECTORY}/a/b")
    assert again is None or again.name == "b"
    listed = {entry.name: entry for entry in capsule.files.list(DIRECTORY)}
    assert set(listed) == {"a", "bytes", "stream", "text"}
    assert listed["text"].size == 6 and listed["text"].permissions == "-rw-r--r--"
    deep = [entry.path for entry in capsule.files.list(DIRECTORY, depth=2)]
    assert f"{DIRECTORY}/a/b" in deep
    assert capsule.files.exists(path) and not capsule.files.exists(f"{DIRECTORY}/none")
    capsule.files.remove(f"{DIRECTORY}/a")
    assert not capsule.files.exists(f"{DIRECTORY}/a")
    refused(WrennNotFoundError, lambda: capsule.files.read(f"{DIRECTORY}/none"))
    refused(WrennNotFoundError, lambda: capsule.files.list(f"{DIRECTORY}/none"))


def until(terminal, text):
    seen = b""
    for event in terminal:
        if event.type == "output":
            seen += event.data or b""
        assert event.type in ("started", "output", "ping"), event
        if text in seen:
            return seen
    raise AssertionError(f"{text} was not seen, but {seen}")


def terminals(capsule):
    script = "stty -echo; echo read''y; while read -r x; do echo \"<$x>\"; stty size; done; exit 6"
    with capsule.pty("/bin/sh", ["-c", script], cols=90, rows=20, envs={"A": "b"}) as terminal:
        terminal.write(b"one\n")
        until(terminal, b"20 90\r\n")
        terminal.resize(100, 30)
        terminal.write("gr\u00fcn\n".encode())
        seen = until(terminal, b"30 100\r\n")
        assert "<gr\u00fcn>\r\n".encode() in seen, seen
        tag = terminal.tag
        assert terminal.pid > 0 and tag
        with capsule.pty_connect(tag) as other:
            other.write(b"two\n")
            until(other, b"<two>\r\n")
            other.write(b"\x04")
            last = [event for event in other][-1]
            assert (last.type, last.exit_code) == ("exit", 6), last
    with capsule.pty("/bin/cat") as terminal:
        assert next(terminal).type == "started"
        terminal.kill()
        last = [event for event in terminal][-1]
        assert (last.type, last.exit_code) == ("exit", 137), last
    with capsule.pty("/no/such/program") as terminal:
        last = [event for event in terminal][-1]
        assert last.type == "error" and last.fatal and last.data, last


def snapshots(client, capsule):
    first = capsule.create_snapshot(name="sdk-base")
    assert (first.name, first.type.value) == ("sdk-base", "snapshot")
    assert first.vcpus == 1 and first.size_bytes > 0 and first.created_at.tzinfo is not None
    refused(WrennConflictError, lambda: capsule.create_snapshot(name="sdk-base"))
    capsule.create_snapshot(name="sdk-base", overwrite=True)
    nameless = capsule.create_snapshot()
    names = [one.name for one in client.snapshots.list(type="snapshot")]
    assert names == [nameless.name, "sdk-base"], names
    assert "minimal" in [one.name for one in client.snapshots.list(type="base")]
    with Capsule(template="sdk-base", wait=True) as child:
        assert child.info.template == "sdk-base"
        assert child.commands.run("echo well").stdout == "well\n"
        client.snapshots.delete("sdk-base")
        assert child.commands.run("echo still").stdout == "still\n"
    client.snapshots.delete(nameless.name)
    assert client.snapshots.list(type="snapshot") == []
    refused(WrennNotFoundError, lambda: client.snapshots.delete("sdk-base"))


def usage(client, capsule):
    # The older version has no such calls.
    if not hasattr(client.capsules, "stats"):
        return
    stats = client.capsules.stats()
    assert stats.range.value == "1h" and stats.current.running_count == 1
    assert (stats.current.vcpus_reserved, stats.current.memory_mb_reserved) == (1, 512)
    # Others ran before, and a child of a snapshot beside this one.
    assert stats.peaks.running_count >= 2 and stats.peaks.memory_mb >= 1024
    series = stats.series
    assert len(series.labels) == len(series.vcpus) > 1 and series.labels[-1].tzinfo is not None
    assert (series.running[-1], series.vcpus[-1], series.memory_mb[-1]) == (1, 1, 512)
    assert client.capsules.stats(range="30d").range.value == "30d"
    refused(WrennValidationError, lambda: client.capsules.stats(range="1d"))

    used = client.capsules.usage()
    assert (used.to - used.from_).days == 30 and len(used.points) == 31
    assert used.points[-1].date == used.to
    assert sum(point.cpu_minutes for point in used.points) > 0
    assert sum(point.ram_mb_minutes for point in used.points) > 0
    week = client.capsules.usage(from_=used.to - timedelta(days=7), to=used.to)
    assert len(week.points) == 8
    refused(WrennValidationError, lambda: client.capsules.usage(from_="yesterday"))


async def at_once():
    async with await AsyncCapsule.create(wait=True) as capsule:
        runs = [capsule.commands.run(f"echo {n}") for n in range(8)]
        done = await asyncio.gather(*runs)
        assert [one.stdout for one in done] == [f"{n}\n" for n in range(8)]
        await capsule.files.write(f"{DIRECTORY}/async", b"x")
        assert await capsule.files.read_bytes(f"{DIRECTORY}/async") == b"x"
        events = [event.type async for event in capsule.commands.stream("echo x")]
        assert events == ["start", "stdout", "exit"]
        paused = await capsule.pause()
        assert paused.status == Status.paused


def main():
    with WrennClient() as client:
        life(client)
        with Capsule(wait=True) as capsule:
            files(capsule)
            commands(capsule)
            terminals(capsule)
            snapshots(client, capsule)
            usage(client, capsule)
        asyncio.run(at_once())
        assert client.capsules.list() == []
    print("all is well with", wrenn.__name__)


main()
