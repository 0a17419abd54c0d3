//! Loads a kernel, its initramfs and command line, and writes the boot parameters by which the
//! kernel finds them (Documentation/arch/x86/boot.rst and zero-page.rst).

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use linux_loader::bootparam::{XLF_KERNEL_64, boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, Elf, KernelLoader, elf};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    ReadVolatile,
};

use super::layout::{
    ACPI_ADDR, CMDLINE_ADDR, CMDLINE_CAPACITY, DEVICE_AREA_START, HIGH_RAM_START, LOW_RAM_END,
    ZERO_PAGE_ADDR,
};
use crate::memory::GuestMemory;

// Types of an entry of the memory map (ACPI 6.5, chapter 15, address range types).
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

// What a bzImage is known by (boot.rst, `boot_flag` and `header`: "HdrS").
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// "Undefined" boot loader (boot.rst, type_of_loader).
const LOADER_UNDEFINED: u8 = 0xff;
/// `LOADED_HIGH`: the protected mode code is at 1 MiB.
const LOADED_HIGH: u8 = 1;
/// First protocol version with `xloadflags`, which tells of a 64-bit entry point.
const PROTOCOL_2_12: u16 = 0x20c;
/// Distance of the 64-bit entry point from the start of the loaded image.
const ENTRY_64_OFFSET: u64 = 0x200;

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be opened.
    #[error("cannot open {path}", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the host says.
        #[source]
        source: std::io::Error,
    },
    /// Neither format of kernel.
    #[error(
        "{path} is no kernel: expected an x86-64 ELF vmlinux ({elf}) or a bzImage ({bzimage})",
        path = path.display()
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// Why it is no ELF kernel.
        elf: linux_loader::loader::Error,
        /// Why it is no bzImage.
        bzimage: linux_loader::loader::Error,
    },
    /// An ELF kernel that is damaged or does not fit.
    #[error("{path} cannot be loaded: it is cut short, damaged, or larger than the memory", path = path.display())]
    Elf {
        /// The file.
        path: PathBuf,
        /// What the loader found.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// A bzImage without a 64-bit entry point.
    #[error("{path} has no 64-bit entry point (boot protocol 2.12 or later, XLF_KERNEL_64)", path = path.display())]
    No64BitEntry {
        /// The file.
        path: PathBuf,
    },
    /// Kernel and initramfs do not fit into the RAM below the device area.
    #[error(
        "{path} ({size} bytes) does not fit beside the kernel into {ram} bytes of memory: give the machine more memory",
        path = path.display()
    )]
    InitramfsTooLarge {
        /// The initramfs.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// RAM below the device area, in bytes.
        ram: u64,
    },
    /// The kernel needs more memory than there is.
    #[error(
        "the kernel needs memory up to {end:#x}, the machine has {ram} bytes: give it more memory"
    )]
    KernelTooLarge {
        /// End of the memory that the kernel needs while it starts.
        end: u64,
        /// RAM below the device area, in bytes.
        ram: u64,
    },
    /// The initramfs cannot be read.
    #[error("cannot read {path}", path = path.display())]
    ReadInitramfs {
        /// The initramfs.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: vm_memory::VolatileMemoryError,
    },
    /// The command line is too long.
    #[error("the kernel command line has {length} bytes, at most {} fit", CMDLINE_CAPACITY - 1)]
    CmdlineTooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// The command line holds a NUL byte.
    #[error("the kernel command line contains a NUL byte")]
    CmdlineNul,
    /// The guest has no RAM where the boot data must go.
    #[error("cannot write the boot data to guest memory")]
    Memory(#[source] GuestMemoryError),
}

/// An open kernel or initramfs.
#[derive(Debug)]
pub struct BootFile {
    path: PathBuf,
    file: File,
}

impl BootFile {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let path = path.to_owned();
        // A FIFO would hold up the open until someone writes to it.
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path);
        // A network file system may read less at a time than it is asked for as long as it is set.
        let blocking = opened.and_then(|file| {
            let flags = rustix::fs::fcntl_getfl(&file)?;
            rustix::fs::fcntl_setfl(&file, flags & !rustix::fs::OFlags::NONBLOCK)?;
            Ok(file)
        });
        match blocking {
            Ok(file) => Ok(Self { path, file }),
            Err(source) => Err(LoadError::Open { path, source }),
        }
    }
}

/// Loads everything that the kernel needs to start, and returns its 64-bit entry point.
///
/// # Errors
/// A file is not what it should be, or does not fit.
pub fn load(
    memory: &GuestMemory,
    kernel: BootFile,
    initramfs: Option<BootFile>,
    cmdline: &str,
) -> Result<GuestAddress, LoadError> {
    let kernel = load_kernel(memory, kernel)?;
    let low_ram = low_ram_end(memory);
    if kernel.end > low_ram {
        return Err(LoadError::KernelTooLarge {
            end: kernel.end,
            ram: low_ram,
        });
    }
    let initramfs = initramfs
        .map(|file| load_initramfs(memory, file, kernel.end, low_ram))
        .transpose()?;
    let cmdline_length = write_cmdline(memory, cmdline)?;

    let mut header = kernel.header;
    header.type_of_loader = LOADER_UNDEFINED;
    header.loadflags |= LOADED_HIGH;
    header.cmd_line_ptr = CMDLINE_ADDR.0 as u32;
    header.cmdline_size = cmdline_length;
    if let Some((address, size)) = initramfs {
        header.ramdisk_image = address;
        header.ramdisk_size = size;
    }
    write_boot_params(memory, header).map_err(LoadError::Memory)?;
    Ok(kernel.entry)
}

struct Kernel {
    entry: GuestAddress,
    /// End of the memory that the kernel uses before it knows the memory map.
    end: u64,
    header: setup_header,
}

fn load_kernel(memory: &GuestMemory, kernel: BootFile) -> Result<Kernel, LoadError> {
    let BootFile {
        path,
        file: mut image,
    } = kernel;

    let elf_error = match Elf::load(memory, None, &mut image, Some(HIGH_RAM_START)) {
        Ok(loaded) => {
            return Ok(Kernel {
                entry: loaded.kernel_load,
                end: loaded.kernel_end,
                header: setup_header {
                    boot_flag: BOOT_FLAG,
                    header: HEADER_MAGIC,
                    kernel_alignment: 0x100_0000,
                    ..Default::default()
                },
            });
        }
        Err(error @ linux_loader::loader::Error::Elf(elf::Error::InvalidElfMagicNumber)) => error,
        Err(source) => return Err(LoadError::Elf { path, source }),
    };

    if let Err(source) = image.seek(SeekFrom::Start(0)) {
        return Err(LoadError::Open { path, source });
    }
    let loaded =
        BzImage::load(memory, None, &mut image, Some(HIGH_RAM_START)).map_err(|bzimage| {
            LoadError::Format {
                path: path.clone(),
                elf: elf_error,
                bzimage,
            }
        })?;
    let header = loaded
        .setup_header
        .filter(|header| {
            let (version, flags) = (header.version, header.xloadflags);
            version >= PROTOCOL_2_12 && flags & XLF_KERNEL_64 != 0
        })
        .ok_or(LoadError::No64BitEntry { path })?;
    let needed = loaded
        .kernel_load
        .0
        .saturating_add(u64::from(header.init_size));
    Ok(Kernel {
        entry: GuestAddress(loaded.kernel_load.0.saturating_add(ENTRY_64_OFFSET)),
        end: loaded.kernel_end.max(needed),
        header,
    })
}

/// End of the RAM below the device area.
fn low_ram_end(memory: &GuestMemory) -> u64 {
    memory
        .iter()
        .filter(|region| region.start_addr() < DEVICE_AREA_START)
        .map(|region| region.last_addr().0 + 1)
        .max()
        .unwrap_or(0)
}

/// Puts the initramfs at the top of the low RAM, page aligned: as far as possible from the
/// kernel, which unpacks or relocates itself upwards.
fn load_initramfs(
    memory: &GuestMemory,
    initramfs: BootFile,
    kernel_end: u64,
    low_ram: u64,
) -> Result<(u32, u32), LoadError> {
    let BootFile {
        path,
        file: mut image,
    } = initramfs;
    let size = match image.metadata() {
        Ok(metadata) => metadata.len(),
        Err(source) => return Err(LoadError::Open { path, source }),
    };
    let too_large = || LoadError::InitramfsTooLarge {
        path: path.clone(),
        size,
        ram: low_ram,
    };
    let address = low_ram
        .checked_sub(size)
        .map(|address| address & !0xfff)
        .filter(|address| *address >= kernel_end)
        .ok_or_else(too_large)?;

    let length = usize::try_from(size).map_err(|_| too_large())?;
    let slice = memory
        .get_slice(GuestAddress(address), length)
        .map_err(LoadError::Memory)?;
    let mut slice = slice;
    image
        .read_exact_volatile(&mut slice)
        .map_err(|source| LoadError::ReadInitramfs {
            path: path.clone(),
            source,
        })?;
    // Both are below the device area, which starts below 4 GiB.
    Ok((address as u32, size as u32))
}

fn write_cmdline(memory: &GuestMemory, cmdline: &str) -> Result<u32, LoadError> {
    let length = cmdline.len();
    if length >= CMDLINE_CAPACITY {
        return Err(LoadError::CmdlineTooLong { length });
    }
    let text = CString::new(cmdline).map_err(|_| LoadError::CmdlineNul)?;
    memory
        .write_slice(text.as_bytes_with_nul(), CMDLINE_ADDR)
        .map_err(LoadError::Memory)?;
    Ok(length as u32)
}

fn write_boot_params(memory: &GuestMemory, header: setup_header) -> Result<(), GuestMemoryError> {
    let mut params = boot_params {
        hdr: header,
        ..Default::default()
    };
    params.acpi_rsdp_addr = ACPI_ADDR.0;
    let map = memory_map(memory);
    for (slot, entry) in params.e820_table.iter_mut().zip(&map) {
        *slot = *entry;
    }
    params.e820_entries = map.len() as u8;
    memory.write_obj(params, ZERO_PAGE_ADDR)
}

fn memory_map(memory: &GuestMemory) -> Vec<boot_e820_entry> {
    let entry = |start: u64, end: u64, kind: u32| boot_e820_entry {
        addr: start,
        size: end - start,
        r#type: kind,
    };
    let mut map = vec![
        entry(0, LOW_RAM_END.0, E820_RAM),
        entry(LOW_RAM_END.0, HIGH_RAM_START.0, E820_RESERVED),
    ];
    for region in memory.iter() {
        let start = region.start_addr().max(HIGH_RAM_START);
        map.push(entry(start.0, region.last_addr().raw_value() + 1, E820_RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn memory() -> GuestMemory {
        crate::memory::allocate(64 << 20, false).unwrap()
    }

    fn file(content: &[u8]) -> BootFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        BootFile::open(file.path()).unwrap()
    }

    /// An ELF executable with one segment of `code` at 1 MiB.
    fn tiny_elf(code: &[u8]) -> Vec<u8> {
        let mut image = Vec::new();
        image.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        image.extend(2_u16.to_le_bytes()); // executable
        image.extend(62_u16.to_le_bytes()); // x86-64
        image.extend(1_u32.to_le_bytes());
        image.extend(0x10_0000_u64.to_le_bytes()); // entry
        image.extend(64_u64.to_le_bytes()); // program headers
        image.extend(0_u64.to_le_bytes());
        image.extend(0_u32.to_le_bytes());
        for half in [64_u16, 56, 1, 0, 0, 0] {
            image.extend(half.to_le_bytes());
        }
        image.extend(1_u32.to_le_bytes()); // PT_LOAD
        image.extend(5_u32.to_le_bytes());
        for field in [
            120,
            0x10_0000,
            0x10_0000,
            code.len() as u64,
            code.len() as u64,
            1,
        ] {
            image.extend(u64::to_le_bytes(field));
        }
        image.extend(code);
        image
    }

    #[test]
    fn boot_data_is_where_the_kernel_looks_for_it() {
        let memory = memory();
        let kernel = file(&tiny_elf(b"\xf4\xf4"));
        let initramfs = file(&[7; 5000]);
        let entry = load(&memory, kernel, Some(initramfs), "console=ttyS0 quiet").unwrap();

        assert_eq!(entry, HIGH_RAM_START);
        assert_eq!(memory.read_obj::<u16>(entry).unwrap(), 0xf4f4);
        let params: boot_params = memory.read_obj(ZERO_PAGE_ADDR).unwrap();
        let header = params.hdr;
        let (image, size) = (header.ramdisk_image, header.ramdisk_size);
        assert_eq!((image, size), ((64 << 20) - 8192, 5000));
        assert_eq!(
            memory
                .read_obj::<u8>(GuestAddress(u64::from(image) + 4999))
                .unwrap(),
            7
        );
        let mut cmdline = [0_u8; 20];
        memory.read_slice(&mut cmdline, CMDLINE_ADDR).unwrap();
        assert_eq!(&cmdline, b"console=ttyS0 quiet\0");
        let rsdp = params.acpi_rsdp_addr;
        assert_eq!(rsdp, ACPI_ADDR.0);

        let (last, count) = (params.e820_table[2], params.e820_entries);
        assert_eq!(count, 3);
        let (start, length) = (last.addr, last.size);
        assert_eq!(start + length, 64 << 20);
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_both_reasons() {
        let error = load(&memory(), file(&[0; 4096]), None, "").unwrap_err();
        assert!(matches!(error, LoadError::Format { .. }), "{error}");
        let error = BootFile::open(Path::new("/nonexistent")).unwrap_err();
        assert!(matches!(error, LoadError::Open { .. }), "{error}");
        let mut cut = tiny_elf(&[0x90; 4096]);
        cut.truncate(600);
        let error = load(&memory(), file(&cut), None, "").unwrap_err();
        assert!(matches!(error, LoadError::Elf { .. }), "{error}");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let kernel = || file(&tiny_elf(b"\xf4"));
        let large = tempfile::NamedTempFile::new().unwrap();
        large.as_file().set_len(64 << 20).unwrap();
        let initramfs = BootFile::open(large.path()).unwrap();
        let error = load(&memory(), kernel(), Some(initramfs), "").unwrap_err();
        assert!(
            matches!(error, LoadError::InitramfsTooLarge { .. }),
            "{error}"
        );
        let error = load(&memory(), kernel(), None, &"x".repeat(2048)).unwrap_err();
        assert!(
            matches!(error, LoadError::CmdlineTooLong { length: 2048 }),
            "{error}"
        );
        let error = load(&memory(), kernel(), None, "a\0b").unwrap_err();
        assert!(matches!(error, LoadError::CmdlineNul), "{error}");
    }
}
