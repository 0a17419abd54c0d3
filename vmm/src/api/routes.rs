//! Every endpoint of Cloud Hypervisor's API and those of our own, what they take, and what becomes of
//! it here.

use std::os::fd::OwnedFd;

use hyper::Method;

use super::BASE_PATH;
use super::body::{self, BodyError};
use crate::control::request::Action;

/// An endpoint.
pub struct Route {
    /// The only method that it takes.
    pub method: Method,
    /// Its path without [`BASE_PATH`].
    pub name: &'static str,
    /// What it does.
    pub handler: Handler,
}

/// What an endpoint does.
#[derive(Clone, Copy)]
pub enum Handler {
    /// Is answered by the server itself.
    Ping,
    /// Takes no body, and asks the owner of the machine.
    Bare(fn() -> Action),
    /// Takes a body, and asks the owner of the machine.
    Body(fn(&[u8]) -> Result<Action, BodyError>),
    /// The same, with the descriptors that came along.
    BodyAndDescriptors(fn(&[u8], Vec<OwnedFd>) -> Result<Action, BodyError>),
    /// Takes a body, and is refused, whatever the body: this VMM lacks what it is for.
    Lacking(&'static str),
}

impl Handler {
    /// Whether the endpoint must be called with a body; if not it must be called without.
    pub fn takes_body(self) -> bool {
        !matches!(self, Self::Ping | Self::Bare(_))
    }
}

/// The endpoint of a path.
pub fn find(path: &str) -> Option<&'static Route> {
    let name = path.strip_prefix(BASE_PATH)?;
    ROUTES.iter().find(|route| route.name == name)
}

const fn get(name: &'static str, handler: Handler) -> Route {
    Route {
        method: Method::GET,
        name,
        handler,
    }
}

const fn put(name: &'static str, handler: Handler) -> Route {
    Route {
        method: Method::PUT,
        name,
        handler,
    }
}

const NO_PCI: &str = "this VMM has no PCI bus, so it cannot pass devices of the host through";
const NO_VHOST: &str = "this VMM has no vhost-user and no vDPA devices: disks are image files, \
     network cards are taps";
const NO_MIGRATION: &str = "this VMM does not migrate virtual machines";

/// All endpoints.
pub static ROUTES: [Route; 33] = [
    get("vmm.ping", Handler::Ping),
    put("vmm.shutdown", Handler::Bare(|| Action::Quit)),
    get("vm.info", Handler::Bare(|| Action::Info)),
    get("vm.counters", Handler::Bare(|| Action::Counters)),
    put("vm.create", Handler::Body(body::create)),
    put("vm.delete", Handler::Bare(|| Action::Delete)),
    put("vm.boot", Handler::Bare(|| Action::Boot)),
    put("vm.shutdown", Handler::Bare(|| Action::Shutdown)),
    put("vm.reboot", Handler::Bare(|| Action::Reboot)),
    put("vm.pause", Handler::Bare(|| Action::Pause)),
    put("vm.resume", Handler::Bare(|| Action::Resume)),
    put("vm.power-button", Handler::Bare(|| Action::PowerButton)),
    put("vm.nmi", Handler::Bare(|| Action::Nmi)),
    put("vm.resize", Handler::Body(body::resize)),
    put("vm.resize-disk", Handler::Body(body::resize_disk)),
    put("vm.add-disk", Handler::Body(body::add_disk)),
    put("vm.add-net", Handler::BodyAndDescriptors(body::add_net)),
    put("vm.add-vsock", Handler::Body(body::add_vsock)),
    put("vm.remove-device", Handler::Body(body::remove_device)),
    put("vm.coredump", Handler::Body(body::core_dump)),
    put("vm.snapshot", Handler::BodyAndDescriptors(body::snapshot)),
    put("vm.restore", Handler::BodyAndDescriptors(body::restore)),
    // Not of Cloud Hypervisor.
    put(
        "vm.replace-disk",
        Handler::BodyAndDescriptors(body::replace_disk),
    ),
    put(
        "vm.working-set",
        Handler::BodyAndDescriptors(body::working_set),
    ),
    put(
        "vm.resize-zone",
        Handler::Lacking("this VMM has no memory zones; vm.resize changes the memory"),
    ),
    put("vm.add-device", Handler::Lacking(NO_PCI)),
    put("vm.add-user-device", Handler::Lacking(NO_PCI)),
    put(
        "vm.add-fs",
        Handler::Lacking("this VMM shares no directories of the host; add a disk instead"),
    ),
    put("vm.add-generic-vhost-user", Handler::Lacking(NO_VHOST)),
    put("vm.add-vdpa", Handler::Lacking(NO_VHOST)),
    put(
        "vm.add-pmem",
        Handler::Lacking("this VMM has no persistent memory devices; add a disk instead"),
    ),
    put("vm.send-migration", Handler::Lacking(NO_MIGRATION)),
    put("vm.receive-migration", Handler::Lacking(NO_MIGRATION)),
];
