//! Changes of a configuration of which no machine has been built yet.

use super::request::{Refusal, Resize};
use crate::config::{DiskConfig, NetConfig, VmConfig, VsockConfig};

/// Ids of the devices that every machine has, in the form that Cloud Hypervisor gives them.
const SINGLE_DEVICES: [&str; 3] = ["__balloon", "__rng", "__serial"];

/// Gives every device without an id one: `_disk0`, `_net1`, `_vsock2`, where the number is the
/// lowest that no device of any kind has.
pub(super) fn assign_ids(config: &mut VmConfig) -> Result<(), Refusal> {
    let mut taken: Vec<String> = SINGLE_DEVICES.map(str::to_owned).to_vec();
    for id in ids(config).into_iter().flatten() {
        take(&mut taken, id)?;
    }
    let mut number = 0;
    let mut fill = |kind: &str, id: &mut Option<String>| {
        if id.is_some() {
            return;
        }
        let is_free = |number: &u32| {
            let names = ["disk", "net", "vsock"].map(|kind| format!("_{kind}{number}"));
            !names.iter().any(|name| taken.contains(name))
        };
        number = (number..).find(is_free).unwrap_or(number);
        *id = Some(format!("_{kind}{number}"));
        number += 1;
    };
    for disk in &mut config.disks {
        fill("disk", &mut disk.id);
    }
    for net in &mut config.net {
        fill("net", &mut net.id);
    }
    if let Some(vsock) = &mut config.vsock {
        fill("vsock", &mut vsock.id);
    }
    Ok(())
}

fn ids(config: &VmConfig) -> Vec<Option<String>> {
    let disks = config.disks.iter().map(|disk| disk.id.clone());
    let cards = config.net.iter().map(|net| net.id.clone());
    let vsock = config.vsock.iter().map(|vsock| vsock.id.clone());
    disks.chain(cards).chain(vsock).collect()
}

fn take(taken: &mut Vec<String>, id: String) -> Result<(), Refusal> {
    if taken.contains(&id) {
        return Err(Refusal::DuplicateId { id });
    }
    taken.push(id);
    Ok(())
}

/// Applies `change` to a copy, and keeps it if it describes a possible machine.
fn change(config: &mut VmConfig, change: impl FnOnce(&mut VmConfig)) -> Result<(), Refusal> {
    let mut changed = config.clone();
    change(&mut changed);
    assign_ids(&mut changed)?;
    changed.validate()?;
    *config = changed;
    Ok(())
}

pub(super) fn add_disk(config: &mut VmConfig, disk: DiskConfig) -> Result<(), Refusal> {
    change(config, |config| config.disks.push(disk))
}

pub(super) fn add_net(config: &mut VmConfig, net: NetConfig) -> Result<(), Refusal> {
    change(config, |config| config.net.push(net))
}

pub(super) fn add_vsock(config: &mut VmConfig, vsock: VsockConfig) -> Result<(), Refusal> {
    if config.vsock.is_some() {
        return Err(Refusal::SecondVsock);
    }
    change(config, |config| config.vsock = Some(vsock))
}

pub(super) fn remove(config: &mut VmConfig, id: &str) -> Result<(), Refusal> {
    let is_it = |other: &Option<String>| other.as_deref() == Some(id);
    let before = ids(config).len();
    config.disks.retain(|disk| !is_it(&disk.id));
    config.net.retain(|net| !is_it(&net.id));
    config.vsock.take_if(|vsock| is_it(&vsock.id));
    if ids(config).len() == before {
        return Err(Refusal::NoDevice { id: id.to_owned() });
    }
    Ok(())
}

pub(super) fn resize(config: &mut VmConfig, resize: Resize) -> Result<(), Refusal> {
    if resize.balloon.is_some() && config.balloon.is_none() {
        return Err(Refusal::Unsupported("the virtual machine has no balloon"));
    }
    change(config, |config| {
        if let (Some(balloon), Some(size)) = (&mut config.balloon, resize.balloon) {
            balloon.size = size;
        }
        if let Some(count) = resize.vcpus {
            config.cpus.boot_vcpus = count;
        }
        if let Some(size) = resize.memory {
            config.memory.size = size;
        }
    })
}
