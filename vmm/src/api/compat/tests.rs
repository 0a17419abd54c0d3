use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::config::{ImageType, VmConfig};

/// All that a client of Cloud Hypervisor writes out for a small machine.
fn verbose() -> Value {
    json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1, "topology": null, "kvm_hyperv": false,
            "max_phys_bits": 46, "affinity": null, "features": {"amx": false},
            "nested": true, "core_scheduling": "Vm", "profile": "Host"},
        "memory": {"size": 536870912, "mergeable": false, "hotplug_method": "Acpi",
            "hotplug_size": null, "hotplugged_size": null, "shared": false,
            "hugepages": false, "hugepage_size": null, "prefault": false, "reserve": false,
            "zones": null, "thp": true},
        "payload": {"firmware": null, "kernel": "/vmlinux", "cmdline": "quiet",
            "initramfs": null},
        "rate_limit_groups": null,
        "disks": [{"path": "/disk", "readonly": true, "direct": false, "iommu": false,
            "num_queues": 1, "queue_size": 128, "vhost_user": false, "vhost_socket": null,
            "rate_limit_group": null, "rate_limiter_config": null, "id": null,
            "disable_io_uring": false, "disable_aio": false, "pci_segment": 0,
            "serial": null, "queue_affinity": null, "backing_files": false,
            "sparse": true, "image_type": "Raw", "lock_granularity": "ByteRange"}],
        "net": [{"tap": "tap0", "ip": "192.168.249.1", "mask": "255.255.255.0",
            "mac": "2e:89:a8:e4:bf:49", "host_mac": null, "mtu": null, "iommu": false,
            "num_queues": 2, "queue_size": 256, "vhost_user": false, "vhost_socket": null,
            "vhost_mode": "Client", "id": null, "fds": null, "rate_limiter_config": null,
            "pci_segment": 0, "offload_tso": true, "offload_ufo": true,
            "offload_csum": true}],
        "rng": {"src": "/dev/urandom", "iommu": false},
        "balloon": {"size": 0, "deflate_on_oom": false, "free_page_reporting": true},
        "fs": null, "pmem": null,
        "serial": {"file": null, "mode": "Null", "iommu": false, "socket": null},
        "console": {"file": null, "mode": "Off", "iommu": false, "socket": null},
        "debug_console": {"file": null, "mode": "Off", "iobase": 233},
        "devices": null, "user_devices": null, "vdpa": null,
        "vsock": {"cid": 3, "socket": "/vsock", "iommu": false, "id": null,
            "pci_segment": 0},
        "pvpanic": false, "iommu": false, "numa": null, "watchdog": false, "gdb": false,
        "pci_segments": null,
        "platform": {"num_pci_segments": 1, "iommu_segments": null,
            "iommu_address_width_bits": 64, "serial_number": null, "uuid": null,
            "oem_strings": null},
        "tpm": null, "landlock_enable": false, "landlock_rules": null
    })
}

fn parse(mut value: Value) -> Result<VmConfig, String> {
    reduce(Shape::Vm, &mut value).map_err(|error| error.to_string())?;
    serde_json::from_value(value).map_err(|error| error.to_string())
}

#[test]
fn defaults_written_out_are_taken() {
    let config = parse(verbose()).unwrap();
    assert_eq!(config.disks.len(), 1);
    assert!(config.disks[0].readonly && config.vsock.is_some());
    let mut guess = verbose();
    guess["disks"][0]["image_type"] = json!("Unknown");
    assert_eq!(parse(guess).unwrap().disks[0].image_type, ImageType::Raw);
    let minimal = parse(json!({"payload": {"kernel": "/k"}, "disks": null})).unwrap();
    assert_eq!(minimal.memory.size, 512 << 20);
}

#[test]
fn what_is_lacking_is_refused_by_name() {
    for (pointer, value, expected) in [
        (
            "/payload/firmware",
            json!("/f"),
            "payload.firmware is \"/f\": this VMM boots",
        ),
        (
            "/devices",
            json!([{"path": "/sys"}]),
            "devices is [{\"path\"",
        ),
        ("/iommu", json!(true), "iommu is true"),
        (
            "/disks/0/pci_segment",
            json!(1),
            "disks[0].pci_segment is 1: this VMM has no PCI",
        ),
        ("/disks/0/vhost_user", json!(true), "disks[0].vhost_user"),
        (
            "/net/0/fds",
            json!([5]),
            "net[0].fds is [5]: a number would",
        ),
        (
            "/platform/uuid",
            json!("x"),
            "platform.uuid is \"x\": this VMM has no SMBIOS",
        ),
        (
            "/platform",
            json!({"color": "red"}),
            "platform is {\"color\":\"red\"}",
        ),
        ("/memory/zones", json!([{"id": "z"}]), "memory.zones"),
        (
            "/debug_console/mode",
            json!("Tty"),
            "debug_console.mode is \"Tty\"",
        ),
        ("/serial/mode", json!("Pty"), "unknown variant `Pty`"),
        (
            "/disks/0/image_type",
            json!("Vhdx"),
            "unknown variant `Vhdx`",
        ),
    ] {
        let mut config = verbose();
        *config.pointer_mut(pointer).unwrap() = value;
        let error = parse(config).unwrap_err();
        assert!(error.contains(expected), "{pointer}: {error}");
    }
    let mut config = verbose();
    config["cpus"]["turbo"] = json!(null);
    let error = parse(config).unwrap_err();
    assert!(error.contains("unknown field `turbo`"), "{error}");
}

/// A field that the configuration has come to know must leave this list.
#[test]
fn no_field_is_taken_off_that_the_configuration_knows() {
    let config = || {
        let mut config = verbose();
        reduce(Shape::Vm, &mut config).unwrap();
        config
    };
    let check = |section: &str, field: &Field| {
        let mut config = config();
        let place = match section {
            "" => &mut config,
            "disks" | "net" => &mut config[section][0],
            _ => &mut config[section],
        };
        place[field.name] = json!("nonsense");
        let error = serde_json::from_value::<VmConfig>(config).unwrap_err();
        let unknown = format!("unknown field `{}`", field.name);
        assert!(
            error.to_string().contains(&unknown),
            "{section}.{}: {error}",
            field.name
        );
    };
    VM.iter().for_each(|field| check("", field));
    for (section, tables) in SECTIONS {
        let fields = tables.iter().flat_map(|table| table.iter());
        let fields = fields.filter(|field| field.name != NET_OF_CLIENTS[0].name);
        fields.for_each(|field| check(section, field));
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-zA-Z0-9/]{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map("[a-z_]{1,8}", inner, 0..4)
                .prop_map(|object| object.into_iter().collect()),
        ]
    })
}

proptest! {
    /// Whatever stands at whatever place, it is taken or refused.
    #[test]
    fn no_value_breaks_the_reader(place in any::<prop::sample::Index>(), value in any_json()) {
        fn places(prefix: &str, value: &Value, into: &mut Vec<String>) {
            into.push(prefix.to_owned());
            match value {
                Value::Object(fields) => fields
                    .iter()
                    .for_each(|(name, value)| places(&format!("{prefix}/{name}"), value, into)),
                Value::Array(elements) => (0..)
                    .zip(elements)
                    .for_each(|(index, value)| places(&format!("{prefix}/{index}"), value, into)),
                _ => {}
            }
        }
        let mut config = verbose();
        let mut all = Vec::new();
        places("", &config, &mut all);
        let pointer = &all[place.index(all.len())];
        *config.pointer_mut(pointer).unwrap() = value;
        let _ = parse(config);
    }
}
