//! Fields of Cloud Hypervisor's configurations that this VMM has no use for.
//!
//! Its clients send whole objects with every default written out. A field listed here is taken
//! off as long as it asks for nothing, and is refused by name, with the reason, if it asks for
//! something. What neither this list nor [`crate::config`] knows is refused as unknown.

use serde_json::{Map, Value};

/// What a body describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// A virtual machine.
    Vm,
    /// A disk.
    Disk,
    /// A network card.
    Net,
    /// The socket device.
    Vsock,
    /// What a snapshot is restored from, and on what.
    Restore,
}

/// Something is asked for that this VMM has not.
#[derive(Debug, thiserror::Error)]
#[error("{path} is {value}: {why}")]
pub struct CompatError {
    path: String,
    value: String,
    why: &'static str,
}

struct Field {
    name: &'static str,
    asks_nothing: Neutral,
    /// Why anything else is refused.
    why: &'static str,
}

/// When a field asks for nothing. `null` never does.
enum Neutral {
    /// `null` only, or an empty array.
    Absent,
    Is(bool),
    Number(u64),
    Text(&'static str),
    /// An object of which each field asks for nothing.
    Object(&'static [Field]),
    /// Whatever it says, it makes no difference.
    Any,
}

const fn field(name: &'static str, asks_nothing: Neutral, why: &'static str) -> Field {
    Field {
        name,
        asks_nothing,
        why,
    }
}

const NO_PCI: &str = "this VMM has no PCI bus; its devices are on virtio-mmio";
const NO_IOMMU: &str = "this VMM has no virtual IOMMU";
const NO_VHOST: &str = "this VMM has no vhost-user and no vDPA devices";
const NO_NUMA: &str = "this VMM has no NUMA nodes and no memory zones";
const NO_PINNING: &str = "this VMM does not pin threads; set their affinity from outside";
const NO_FIRMWARE: &str = "this VMM boots Linux kernels directly and has no firmware";
const NO_CONSOLE_SOCKET: &str = "this VMM connects no console to a socket; use a file or the \
     terminal";
const NO_SHARING: &str = "guest memory is always private, and backed by what the host gives";
const PRIVATE_PAGES: &str = "guest memory is taken from the host as the guest touches it";
const TAP_ONLY: &str = "this VMM changes nothing about a tap; set it up on the host";

/// Of the machine as a whole.
const VM: &[Field] = &[
    field(
        "rate_limit_groups",
        Neutral::Absent,
        "each device has rate limiters of its own only",
    ),
    field(
        "fs",
        Neutral::Absent,
        "this VMM shares no directories of the host",
    ),
    field(
        "pmem",
        Neutral::Absent,
        "this VMM has no persistent memory devices",
    ),
    field("devices", Neutral::Absent, NO_PCI),
    field("user_devices", Neutral::Absent, NO_PCI),
    field("vdpa", Neutral::Absent, NO_VHOST),
    field("generic_vhost_user", Neutral::Absent, NO_VHOST),
    field("ivshmem", Neutral::Absent, NO_PCI),
    field("pvmemcontrol", Neutral::Absent, NO_PCI),
    field("numa", Neutral::Absent, NO_NUMA),
    field("sgx_epc", Neutral::Absent, "this VMM has no SGX memory"),
    field("tpm", Neutral::Absent, "this VMM has no TPM"),
    field("iommu", Neutral::Is(false), NO_IOMMU),
    field(
        "watchdog",
        Neutral::Is(false),
        "this VMM has no watchdog device",
    ),
    field("gdb", Neutral::Is(false), "this VMM has no debugger stub"),
    // Every machine reports its panics.
    field("pvpanic", Neutral::Any, ""),
    field("pci_segments", Neutral::Absent, NO_PCI),
    field(
        "platform",
        Neutral::Object(PLATFORM),
        "this VMM has no SMBIOS and no PCI segments",
    ),
    field(
        "debug_console",
        Neutral::Object(DEBUG_CONSOLE),
        "this VMM has no debug port; use the serial port",
    ),
    field(
        "landlock_enable",
        Neutral::Is(false),
        "how the VMM is confined is chosen when it is started",
    ),
    field(
        "landlock_rules",
        Neutral::Absent,
        "how the VMM is confined is chosen when it is started",
    ),
];

/// Of a restore.
const RESTORE: &[Field] = &[
    // Memory is read when it is touched, in either mode.
    field("memory_restore_mode", Neutral::Any, ""),
    field("zone_updates", Neutral::Absent, NO_NUMA),
];

const PLATFORM: &[Field] = &[
    field("num_pci_segments", Neutral::Number(1), NO_PCI),
    field("iommu_segments", Neutral::Absent, NO_IOMMU),
    field("iommu_address_width_bits", Neutral::Any, ""),
    field("serial_number", Neutral::Absent, "this VMM has no SMBIOS"),
    field("uuid", Neutral::Absent, "this VMM has no SMBIOS"),
    field("oem_strings", Neutral::Absent, "this VMM has no SMBIOS"),
    field(
        "tdx",
        Neutral::Is(false),
        "this VMM has no confidential guests",
    ),
    field(
        "sev_snp",
        Neutral::Is(false),
        "this VMM has no confidential guests",
    ),
];

const DEBUG_CONSOLE: &[Field] = &[
    field("mode", Neutral::Text("Off"), "this VMM has no debug port"),
    field("file", Neutral::Absent, "this VMM has no debug port"),
    field("iobase", Neutral::Any, ""),
];

const CPUS: &[Field] = &[
    field(
        "topology",
        Neutral::Absent,
        "each vCPU is a socket of its own",
    ),
    field(
        "kvm_hyperv",
        Neutral::Is(false),
        "this VMM runs no Windows guests",
    ),
    field(
        "max_phys_bits",
        Neutral::Number(46),
        "guests have 46 physical address bits",
    ),
    field("affinity", Neutral::Absent, NO_PINNING),
    field(
        "features",
        Neutral::Object(CPU_FEATURES),
        "CPU features are those of the host",
    ),
    // Guests see the processor's virtualization as far as the host's KVM offers it.
    field("nested", Neutral::Any, ""),
    field(
        "core_scheduling",
        Neutral::Text("Vm"),
        "this VMM does not change core scheduling",
    ),
    field(
        "profile",
        Neutral::Text("Host"),
        "guests have the processor of the host",
    ),
];

const CPU_FEATURES: &[Field] = &[field(
    "amx",
    Neutral::Is(false),
    "AMX is there where the host's KVM offers it, and cannot be asked for",
)];

const MEMORY: &[Field] = &[
    field("mergeable", Neutral::Is(false), NO_SHARING),
    field("shared", Neutral::Is(false), NO_SHARING),
    field(
        "hugepages",
        Neutral::Is(false),
        "this VMM uses transparent huge pages only",
    ),
    field(
        "hugepage_size",
        Neutral::Absent,
        "this VMM uses transparent huge pages only",
    ),
    field("prefault", Neutral::Is(false), PRIVATE_PAGES),
    field("reserve", Neutral::Is(false), PRIVATE_PAGES),
    field("zones", Neutral::Absent, NO_NUMA),
];

const PAYLOAD: &[Field] = &[
    field("firmware", Neutral::Absent, NO_FIRMWARE),
    field("igvm", Neutral::Absent, NO_FIRMWARE),
    field(
        "host_data",
        Neutral::Absent,
        "this VMM has no confidential guests",
    ),
    field("fw_cfg_config", Neutral::Absent, NO_FIRMWARE),
];

/// Of every virtio device.
const DEVICE: &[Field] = &[
    field("iommu", Neutral::Is(false), NO_IOMMU),
    field("pci_segment", Neutral::Number(0), NO_PCI),
    field("pci_device_id", Neutral::Absent, NO_PCI),
];

const DISK: &[Field] = &[
    field("vhost_user", Neutral::Is(false), NO_VHOST),
    field("vhost_socket", Neutral::Absent, NO_VHOST),
    field(
        "rate_limit_group",
        Neutral::Absent,
        "each device has rate limiters of its own only",
    ),
    field("disable_io_uring", Neutral::Any, ""),
    field("disable_aio", Neutral::Any, ""),
    field("queue_affinity", Neutral::Absent, NO_PINNING),
    field(
        "lock_granularity",
        Neutral::Text("ByteRange"),
        "this VMM chooses how images are locked",
    ),
];

const NET: &[Field] = &[
    field("ip", Neutral::Text("192.168.249.1"), TAP_ONLY),
    field("mask", Neutral::Text("255.255.255.0"), TAP_ONLY),
    field("host_mac", Neutral::Absent, TAP_ONLY),
    field("mtu", Neutral::Absent, TAP_ONLY),
    field("vhost_user", Neutral::Is(false), NO_VHOST),
    field("vhost_socket", Neutral::Absent, NO_VHOST),
    field("vhost_mode", Neutral::Text("Client"), NO_VHOST),
];

/// What the configuration of a card knows, and no client may say.
const NET_OF_CLIENTS: &[Field] = &[field(
    "fds",
    Neutral::Absent,
    "a number would name a descriptor of the VMM, not of the client; name the tap, or send its \
     descriptors along with vm.add-net",
)];

/// Of serial port and console.
const CONSOLE: &[Field] = &[
    field("socket", Neutral::Absent, NO_CONSOLE_SOCKET),
    field("iommu", Neutral::Is(false), NO_IOMMU),
];

const CONSOLE_FILE: &[Field] = &[field(
    "file",
    Neutral::Absent,
    "this VMM has no virtio console; use the serial port",
)];

/// The objects within a machine, by name, and what is taken off each.
const SECTIONS: &[(&str, &[&[Field]])] = &[
    ("cpus", &[CPUS]),
    ("memory", &[MEMORY]),
    ("payload", &[PAYLOAD]),
    ("disks", &[DISK, DEVICE]),
    ("net", &[NET, NET_OF_CLIENTS, DEVICE]),
    ("vsock", &[DEVICE]),
    ("rng", &[DEVICE]),
    ("balloon", &[DEVICE]),
    ("serial", &[CONSOLE]),
    ("console", &[CONSOLE, CONSOLE_FILE]),
];

/// Takes off what asks for nothing.
///
/// # Errors
/// Something is asked for that this VMM has not.
pub fn reduce(shape: Shape, value: &mut Value) -> Result<(), CompatError> {
    match shape {
        Shape::Vm => reduce_sections(value, VM),
        Shape::Restore => reduce_sections(value, RESTORE),
        Shape::Disk => reduce_disk("disk", value),
        Shape::Net => reduce_all("net", value, &[NET, NET_OF_CLIENTS, DEVICE]),
        Shape::Vsock => reduce_all("vsock", value, &[DEVICE]),
    }
}

/// An object of which some fields are objects within a machine.
fn reduce_sections(value: &mut Value, fields: &[Field]) -> Result<(), CompatError> {
    let Value::Object(vm) = value else {
        return Ok(());
    };
    reduce_object("", vm, fields)?;
    for (name, tables) in SECTIONS {
        match vm.get_mut(*name) {
            Some(Value::Null) => {
                vm.remove(*name);
            }
            Some(Value::Array(elements)) => {
                for (index, element) in elements.iter_mut().enumerate() {
                    let path = format!("{name}[{index}]");
                    match *name {
                        "disks" => reduce_disk(&path, element)?,
                        _ => reduce_all(&path, element, tables)?,
                    }
                }
            }
            Some(section) => reduce_all(name, section, tables)?,
            None => {}
        }
    }
    Ok(())
}

/// What Cloud Hypervisor guesses when it is not told, this VMM takes for its default, as if the
/// field were not there: a guest may have written what the guess would look at.
fn reduce_disk(path: &str, value: &mut Value) -> Result<(), CompatError> {
    reduce_all(path, value, &[DISK, DEVICE])?;
    if let Value::Object(disk) = value
        && disk.get("image_type").is_some_and(|kind| kind == "Unknown")
    {
        disk.remove("image_type");
    }
    Ok(())
}

/// What is no object is left for the deserializer to refuse.
fn reduce_all(path: &str, value: &mut Value, tables: &[&[Field]]) -> Result<(), CompatError> {
    let Value::Object(object) = value else {
        return Ok(());
    };
    tables
        .iter()
        .try_for_each(|table| reduce_object(path, object, table))
}

fn reduce_object(
    path: &str,
    object: &mut Map<String, Value>,
    fields: &[Field],
) -> Result<(), CompatError> {
    for field in fields {
        if let Some(value) = object.remove(field.name) {
            let path = match path {
                "" => field.name.to_owned(),
                _ => format!("{path}.{}", field.name),
            };
            check(&path, value, field)?;
        }
    }
    Ok(())
}

fn check(path: &str, value: Value, field: &Field) -> Result<(), CompatError> {
    let asks_nothing = match (&field.asks_nothing, &value) {
        (_, Value::Null) | (Neutral::Any, _) => true,
        (Neutral::Absent, Value::Array(elements)) => elements.is_empty(),
        (Neutral::Is(neutral), Value::Bool(value)) => value == neutral,
        (Neutral::Number(neutral), value) => value.as_u64() == Some(*neutral),
        (Neutral::Text(neutral), Value::String(value)) => value == neutral,
        (Neutral::Object(fields), Value::Object(object)) => {
            let mut rest = object.clone();
            reduce_object(path, &mut rest, fields)?;
            rest.is_empty()
        }
        _ => false,
    };
    if asks_nothing {
        return Ok(());
    }
    // Enough to recognize it by.
    let value = value.to_string().chars().take(64).collect();
    Err(CompatError {
        path: path.to_owned(),
        value,
        why: field.why,
    })
}

#[cfg(test)]
mod tests;
