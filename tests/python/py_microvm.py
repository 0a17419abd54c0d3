"""Every public method of py-microvm, as it comes from PyPI, against a daemon.

    py_microvm.py URL TOKEN DIRECTORY

DIRECTORY is one in virtual machines whose files can be written.
"""

import asyncio
import hashlib
import sys
import tempfile
from datetime import datetime, timedelta, timezone

from microvm_client import MicroVMClient
from microvm_client.exceptions import AuthenticationError, NetworkError, VMNotFoundError
from microvm_client.models import VMState


async def fails(expected, call):
    try:
        await call
    except expected as error:
        return error
    raise AssertionError(f"no {expected.__name__}")


async def machine(client, directory):
    vm = await client.start_vm("linux-default", {"vcpus": 2, "memory_mb": 256})
    assert vm.state is VMState.RUNNING, vm
    assert (vm.vcpus, vm.memory_mb) == (2, 256), vm
    assert vm.id and vm.name, vm
    age = datetime.now(timezone.utc) - vm.created_at
    assert timedelta(seconds=-2) < age < timedelta(minutes=10), vm
    assert await client.get_vm(vm.id) == vm
    assert [listed.id for listed in await client.list_vms()] == [vm.id]

    said = await client.exec_command(vm.id, "printf out", timeout=60)
    assert (said.success, said.exit_code, said.stdout, said.stderr) == (True, 0, "out", ""), said
    assert said.execution_time_ms >= 0, said
    said = await client.exec_command(vm.id, "ls /no/such")
    assert not said.success and said.exit_code == 2 and "/no/such" in said.stderr, said
    # One that outruns its time is an error of the network to this client.
    late = await fails(NetworkError, client.exec_command(vm.id, "sleep 60", timeout=1))
    assert "504" in late.message, late

    content = bytes(range(256)) * 4096
    remote = f"{directory}/of py-microvm"
    with tempfile.NamedTemporaryFile() as local:
        local.write(content)
        local.flush()
        sent = await client.upload_file(vm.id, local.name, remote)
    digest = hashlib.sha256(content).hexdigest()
    assert (sent.success, sent.size_bytes, sent.checksum) == (True, len(content), digest), sent
    said = await client.exec_command(vm.id, f"sha256sum '{remote}'")
    assert said.stdout.startswith(digest), said

    await client.destroy_vm(vm.id)
    assert await client.list_vms() == []
    for call in [
        client.get_vm(vm.id),
        client.exec_command(vm.id, "true"),
        client.destroy_vm(vm.id),
    ]:
        await fails(VMNotFoundError, call)
    with tempfile.NamedTemporaryFile() as local:
        await fails(VMNotFoundError, client.upload_file(vm.id, local.name, remote))


async def main(url, token, directory):
    async with MicroVMClient(url, api_token=token, timeout=300) as client:
        await machine(client, directory)
        await fails(NetworkError, client.start_vm("no-such"))
    async with MicroVMClient(url) as client:
        await fails(AuthenticationError, client.start_vm("linux-default"))
    await fails(AuthenticationError, MicroVMClient(url, api_token="forged").__aenter__())


asyncio.run(main(*sys.argv[1:]))
print("every method of py-microvm works")
