//! Kernel modules that the initramfs carries for a kernel without built-in drivers.
//!
//! `/modules/order` names one file of `/modules` per line, dependencies first.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use rustix::{io::Errno, system::finit_module};

use crate::log::{info, warning};

/// Loads all modules, then removes their files, whose memory the guest has better use for. A
/// module that does not load is passed over: it may be built in, or serve absent hardware.
pub fn load(directory: &Path) {
    let order = match fs::read_to_string(directory.join("order")) {
        Ok(order) => order,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return,
        Err(error) => return warning!("cannot read the list of kernel modules: {error}"),
    };
    let mut loaded = 0;
    for name in order.lines().filter(|line| !line.is_empty()) {
        match load_one(&directory.join(name)) {
            Ok(()) => loaded += 1,
            Err(error) => warning!("kernel module {name} is not loaded: {error}"),
        }
    }
    info!("loaded {loaded} kernel modules");
    if let Err(error) = fs::remove_dir_all(directory) {
        warning!("cannot remove {}: {error}", directory.display());
    }
}

fn load_one(path: &Path) -> io::Result<()> {
    match finit_module(File::open(path)?, c"", 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(e.into()),
    }
}
