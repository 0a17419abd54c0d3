use super::*;
use crate::config::{BackingImage, HotplugMethod, ImageType};
use crate::rate_limiter::{RateLimiterConfig, TokenBucketConfig};

fn parse(arguments: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once("vmm").chain(arguments.split(' ')))
}

#[test]
fn flags_become_a_configuration() {
    let cli = parse(
        "--kernel k --initramfs i --cpus boot=4 \
         --memory size=1G,hotplug_method=virtio-mem,hotplug_size=2G,hotplugged_size=512M \
         --disk path=a.qcow2,image_type=qcow2,backing_files=on --disk path=b,readonly=on \
         --net tap=tap0,mac=52:54:00:12:34:56 --vsock cid=3,socket=/s --serial file=log \
         --balloon size=64M,free_page_reporting=on --event-monitor fd=5",
    )
    .unwrap();
    let Start::Boot(config) = cli.boot.start().unwrap() else {
        panic!("no machine to boot")
    };
    assert_eq!(
        config.cpus,
        CpusConfig {
            boot_vcpus: 4,
            max_vcpus: 4
        }
    );
    let expected = MemoryConfig {
        size: 1 << 30,
        thp: true,
        hotplug_method: HotplugMethod::VirtioMem,
        hotplug_size: Some(2 << 30),
        hotplugged_size: Some(512 << 20),
    };
    assert_eq!(config.memory, expected);
    assert_eq!(config.disks[0].image_type, ImageType::Qcow2);
    assert!(config.disks[0].backing_files && !config.disks[0].readonly);
    assert!(config.disks[1].readonly);
    assert_eq!(config.net[0].mac.unwrap().to_string(), "52:54:00:12:34:56");
    assert_eq!(config.vsock.as_ref().unwrap().cid, 3);
    assert_eq!(
        config.balloon.unwrap(),
        BalloonConfig {
            size: 64 << 20,
            deflate_on_oom: false,
            free_page_reporting: true
        }
    );
    assert_eq!(config.serial.file.as_deref().unwrap().to_str(), Some("log"));
    assert_eq!(cli.boot.event_monitor, Some(EventTarget::Fd(5)));
}

#[test]
fn queues_limits_and_descriptors_are_those_of_cloud_hypervisor() {
    let cli = parse(
        "--kernel k --net fd=[5,6],num_queues=4,queue_size=64,offload_tso=off,ops_size=10,\
         ops_refill_time=1000 --disk path=a,num_queues=2,queue_size=32,direct=on,sparse=off,\
         bw_size=4096,bw_one_time_burst=8192,bw_refill_time=100",
    )
    .unwrap();
    let [card] = &cli.boot.net[..] else {
        panic!("one card");
    };
    let bucket = |size, one_time_burst, refill_time| {
        Some(TokenBucketConfig {
            size,
            one_time_burst,
            refill_time,
        })
    };
    let expected = NetConfig {
        fds: Some(vec![5, 6]),
        num_queues: 4,
        queue_size: 64,
        offload_tso: false,
        rate_limiter_config: Some(RateLimiterConfig {
            bandwidth: None,
            ops: bucket(10, None, 1000),
        }),
        ..NetConfig::default()
    };
    assert_eq!(*card, expected);
    let expected = DiskConfig {
        num_queues: 2,
        queue_size: 32,
        direct: true,
        sparse: false,
        rate_limiter_config: Some(RateLimiterConfig {
            bandwidth: bucket(4096, Some(8192), 100),
            ops: None,
        }),
        ..DiskConfig::new("a")
    };
    assert_eq!(cli.boot.disks[0], expected);
}

#[test]
fn mistakes_are_named() {
    for (arguments, named) in [
        ("--kernel k --cpus boots=4", "known are boot, max"),
        ("--kernel k --cpus boot=300", "boot=300"),
        ("--kernel k --memory size=much", "512M"),
        (
            "--kernel k --memory size=1G,hotplug_method=dimm",
            "acpi or virtio-mem",
        ),
        ("--kernel k --memory size=99999999999G", "no size"),
        ("--kernel k --disk readonly=on", "path is missing"),
        ("--kernel k --disk path=a,path=b", "twice"),
        ("--kernel k --disk path=a,readonly=maybe", "on or off"),
        (
            "--kernel k --net tap=t,mac=01:00:5e:00:00:01",
            "group address",
        ),
        ("--kernel k --net fd=2", "above 2"),
        ("--kernel k --net fd=[3,x]", "[3,4]"),
        ("--kernel k --net tap=t,num_queues=-2", "num_queues=-2"),
        ("--kernel k --disk path=a,bw_size=1", "bw_refill_time"),
        ("--kernel k --disk path=a,ops_one_time_burst=1", "ops_size"),
        ("--kernel k --vsock socket=/s", "cid is missing"),
        ("--kernel k --balloon deflate_on_oom=on", "size is missing"),
        ("--kernel k --serial printer", "expected tty"),
        ("--kernel k --console tty", "no virtio console"),
        ("--kernel k --event-monitor fd=1", "above 2"),
        ("--kernel k --boot-timer 5", "fd=N or path=PATH"),
        ("--kernel k --gdb /s --jail", "cannot be used with"),
        ("--kernel k --gdb fd=0", "above 2"),
        ("--cpus boot=1", "--kernel"),
        ("--api-socket fd=2", "above 2"),
        ("--api-socket port=80", "path=PATH or fd=N"),
        ("--kernel k --no-shutdown", "--api-socket"),
        ("--api-socket /s --cpus boot=2", "--kernel"),
        ("--api-socket /s --disk path=d", "--kernel"),
    ] {
        let error = parse(arguments).unwrap_err().to_string();
        assert!(error.contains(named), "{arguments}: {error}");
    }
}

#[test]
fn a_machine_goes_on_as_it_was_or_as_the_flags_say() {
    let restore = |arguments| match parse(arguments).unwrap().boot.start() {
        Ok(Start::Restore(restore)) => Ok(restore),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error),
    };
    let as_it_was = restore(
        "--restore source_url=file:///s,base_url=[file:///b,file:///a],resume=off \
         --disk path=d,image_type=qcow2,backing=[qcow2:/e,raw:/f]",
    )
    .unwrap();
    let snapshot = &as_it_was.snapshot;
    assert_eq!(snapshot.source, PathBuf::from("/s"));
    assert_eq!(snapshot.bases, [PathBuf::from("/b"), PathBuf::from("/a")]);
    assert!(!as_it_was.resume && as_it_was.config.is_none());
    let disk = &as_it_was.changes.disks[0];
    let image = |image_type, path: &str| BackingImage {
        image_type,
        path: path.into(),
    };
    let chain = [image(ImageType::Qcow2, "/e"), image(ImageType::Raw, "/f")];
    assert_eq!(disk.backing, chain);

    let flags = "--restore source_url=file:///s,config=flags --memory size=64M --cpus boot=2";
    let as_flags_say = restore(flags).unwrap();
    let config = as_flags_say.config.unwrap();
    assert_eq!((config.memory.size, config.cpus.boot_vcpus), (64 << 20, 2));
    assert!(config.payload.is_none() && as_flags_say.resume);

    let error = restore("--restore source_url=file:///s --memory size=64M").unwrap_err();
    assert!(error.starts_with("--memory has no say"), "{error}");
    for bad in [
        "--restore source_url=/s",
        "--restore base_url=file:///s",
        "--restore source_url=file:///s,config=what",
        "--restore source_url=file:///s --kernel k",
        "--memory size=64M",
    ] {
        assert!(parse(bad).is_err(), "{bad}");
    }
}

#[test]
fn the_api_needs_no_kernel() {
    let cli = parse("--api-socket /run/api.sock --no-shutdown").unwrap();
    let path = ApiTarget::Path("/run/api.sock".into());
    assert_eq!(cli.boot.api_socket, Some(path.clone()));
    assert!(cli.boot.no_shutdown);
    assert!(matches!(cli.boot.start(), Ok(Start::Nothing)));
    let cli = parse("--api-socket path=/run/api.sock --kernel k").unwrap();
    assert_eq!(cli.boot.api_socket, Some(path));
    let cli = parse("--api-socket fd=7").unwrap();
    assert_eq!(cli.boot.api_socket, Some(ApiTarget::Fd(7)));
}

#[test]
fn debugging_aids_are_told_where_to_go() {
    let arguments = "--kernel k --boot-timer path=t --log-file l --gdb path=s -vv";
    let args = parse(arguments).unwrap().boot;
    assert_eq!(args.boot_timer, Some(EventTarget::Path("t".into())));
    assert_eq!(args.log_file, Some("l".into()));
    assert_eq!(args.gdb, Some(ApiTarget::Path("s".into())));
    assert_eq!(args.verbose, 2);
}

#[test]
fn a_jail_may_be_as_it_comes_or_given_an_identity() {
    let jail = |arguments| parse(arguments).unwrap().boot.jail;
    assert_eq!(jail("--kernel k"), None);
    assert_eq!(jail("--jail --kernel k"), Some(JailConfig::default()));
    let config = JailConfig {
        uid: Some(7),
        gid: Some(8),
        cgroup: Some("/c".into()),
    };
    assert_eq!(
        jail("--kernel k --jail uid=7,gid=8,cgroup=/c"),
        Some(config)
    );
    let error = parse("--kernel k --jail uid=-1").unwrap_err();
    assert!(error.to_string().contains("uid=-1"));
}

#[test]
fn doctor_needs_no_kernel() {
    assert!(matches!(
        parse("doctor --json").unwrap().command,
        Some(Command::Doctor { json: true })
    ));
}
