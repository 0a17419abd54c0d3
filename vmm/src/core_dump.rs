//! A core file of the guest: its memory and the registers of its vCPUs, as an ELF file that
//! debuggers read (System V ABI, chapter 5; Linux, include/uapi/linux/elf.h and elfcore.h).
//!
//! ```text
//!  ELF header │ program headers: PT_NOTE, one PT_LOAD a region │ NT_PRSTATUS a vCPU │ memory
//! ```
//!
//! Addresses are guest physical. Pages of zeros are holes in the file.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::{GuestMemory, is_zero};

// `Elf64_Ehdr` and `Elf64_Phdr` of elf(5), in bytes.
const HEADER_SIZE: u64 = 64;
const PROGRAM_HEADER_SIZE: u64 = 56;
/// Bytes of a page.
const PAGE: usize = 4096;
/// How much memory is read at a time, in bytes.
const CHUNK: usize = 64 * PAGE;

// Values of elf(5); those of notes are in `linux/elf.h`.
const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const PF_READ_WRITE_EXECUTE: u32 = 7;
const NT_PRSTATUS: u32 = 1;
const NOTE_NAME: &[u8; 8] = b"CORE\0\0\0\0";
/// `struct elf_prstatus` of x86-64 (`linux/elfcore.h`), in bytes.
const PRSTATUS_SIZE: usize = 336;
/// Offset of `pr_pid` in it.
const PRSTATUS_PID: usize = 32;
/// Offset of `pr_reg` in it.
const PRSTATUS_REGISTERS: usize = 112;

/// Why there is no core file.
#[derive(Debug, thiserror::Error)]
pub enum CoreDumpError {
    /// The file cannot be made.
    #[error("cannot create {path}", path = path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// The file cannot be filled.
    #[error("cannot write {path}", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
}

/// The registers of one vCPU.
pub struct Registers {
    regs: kvm_regs,
    sregs: kvm_sregs,
}

/// Reads the registers of a vCPU that does not run.
///
/// # Errors
/// KVM refuses.
pub fn registers(vcpu: &VcpuFd) -> Result<Registers, kvm_ioctls::Error> {
    Ok(Registers {
        regs: vcpu.get_regs()?,
        sregs: vcpu.get_sregs()?,
    })
}

/// Writes the core file of a guest that does not run. The file must not exist.
///
/// # Errors
/// The file cannot be made or filled; what has been written of it is removed.
pub fn write(path: &Path, memory: &GuestMemory, vcpus: &[Registers]) -> Result<(), CoreDumpError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|source| CoreDumpError::Create {
            path: path.to_owned(),
            source,
        })?;
    fill(&mut file, memory, vcpus).map_err(|source| {
        // It is of no use to anybody, and there may be no room for anything else.
        let _ = std::fs::remove_file(path);
        CoreDumpError::Write {
            path: path.to_owned(),
            source,
        }
    })
}

fn fill(file: &mut File, memory: &GuestMemory, vcpus: &[Registers]) -> io::Result<()> {
    let notes: Vec<u8> = (1..)
        .zip(vcpus)
        .flat_map(|(pid, vcpu)| note(pid, vcpu))
        .collect();
    let regions: Vec<(GuestAddress, u64)> = memory
        .iter()
        .map(|region| (region.start_addr(), region.len()))
        .collect();
    let headers = HEADER_SIZE + PROGRAM_HEADER_SIZE * (1 + regions.len() as u64);
    let mut offset = (headers + notes.len() as u64).next_multiple_of(PAGE as u64);

    let mut head = elf_header(1 + regions.len() as u16);
    head.extend(program_header(PT_NOTE, headers, 0, notes.len() as u64));
    let mut places = Vec::new();
    for (start, size) in regions {
        head.extend(program_header(PT_LOAD, offset, start.raw_value(), size));
        places.push((offset, start, size));
        offset += size;
    }
    file.write_all(&head)?;
    file.write_all(&notes)?;
    for (offset, start, size) in places {
        write_region(file, memory, offset, start, size)?;
    }
    // The last pages may be a hole.
    file.set_len(offset)
}

fn write_region(
    file: &mut File,
    memory: &GuestMemory,
    offset: u64,
    start: GuestAddress,
    size: u64,
) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    let mut done = 0;
    while done < size {
        // Lossless: at most a chunk.
        let len = (size - done).min(CHUNK as u64) as usize;
        let chunk = &mut chunk[..len];
        let address = start.unchecked_add(done);
        memory
            .read_slice(chunk, address)
            .map_err(io::Error::other)?;
        for (index, page) in (0u64..).zip(chunk.chunks(PAGE)) {
            if !is_zero(page) {
                let at = offset + done + index * PAGE as u64;
                file.seek(SeekFrom::Start(at))?;
                file.write_all(page)?;
            }
        }
        done += len as u64;
    }
    Ok(())
}

fn elf_header(program_headers: u16) -> Vec<u8> {
    let mut header = Vec::new();
    // 64 bits, little-endian, version 1, System V.
    header.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    header.extend(ET_CORE.to_le_bytes());
    header.extend(EM_X86_64.to_le_bytes());
    header.extend(1u32.to_le_bytes());
    // No entry point; program headers follow; no section headers; no flags.
    header.extend(0u64.to_le_bytes());
    header.extend(HEADER_SIZE.to_le_bytes());
    header.extend(0u64.to_le_bytes());
    header.extend(0u32.to_le_bytes());
    header.extend((HEADER_SIZE as u16).to_le_bytes());
    header.extend((PROGRAM_HEADER_SIZE as u16).to_le_bytes());
    header.extend(program_headers.to_le_bytes());
    header.extend([0; 6]);
    header
}

fn program_header(kind: u32, offset: u64, address: u64, size: u64) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend(kind.to_le_bytes());
    let flags = if kind == PT_LOAD {
        PF_READ_WRITE_EXECUTE
    } else {
        0
    };
    header.extend(flags.to_le_bytes());
    for word in [offset, address, address, size, size, 0] {
        header.extend(word.to_le_bytes());
    }
    header
}

/// One NT_PRSTATUS note, padded to 4 bytes as all of its parts are.
fn note(pid: u32, vcpu: &Registers) -> Vec<u8> {
    let Registers { regs, sregs } = vcpu;
    let mut status = vec![0; PRSTATUS_SIZE];
    status[PRSTATUS_PID..][..4].copy_from_slice(&pid.to_le_bytes());
    // `struct user_regs_struct`, in which orig_rax has no meaning here.
    let words = [
        regs.r15,
        regs.r14,
        regs.r13,
        regs.r12,
        regs.rbp,
        regs.rbx,
        regs.r11,
        regs.r10,
        regs.r9,
        regs.r8,
        regs.rax,
        regs.rcx,
        regs.rdx,
        regs.rsi,
        regs.rdi,
        u64::MAX,
        regs.rip,
        u64::from(sregs.cs.selector),
        regs.rflags,
        regs.rsp,
        u64::from(sregs.ss.selector),
        sregs.fs.base,
        sregs.gs.base,
        u64::from(sregs.ds.selector),
        u64::from(sregs.es.selector),
        u64::from(sregs.fs.selector),
        u64::from(sregs.gs.selector),
    ];
    for (place, word) in status[PRSTATUS_REGISTERS..].chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    let mut note = Vec::new();
    // The length of the name counts its first zero byte, and not the padding.
    note.extend(5u32.to_le_bytes());
    note.extend((PRSTATUS_SIZE as u32).to_le_bytes());
    note.extend(NT_PRSTATUS.to_le_bytes());
    note.extend_from_slice(NOTE_NAME);
    note.extend(status);
    note
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::memory;

    #[test]
    fn a_core_file_holds_memory_and_registers() {
        let memory = memory::allocate(64 << 20, false).unwrap();
        memory
            .write_slice(b"here", GuestAddress(0x12_3456))
            .unwrap();
        let vcpu = |rip| Registers {
            regs: kvm_regs {
                rip,
                ..Default::default()
            },
            sregs: kvm_sregs::default(),
        };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("core");
        write(&path, &memory, &[vcpu(0x1111), vcpu(0x2222)]).unwrap();

        let file = std::fs::read(&path).unwrap();
        let word = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize;
        assert_eq!(&file[..4], b"\x7fELF");
        // PT_NOTE: where the notes are; each is 20 bytes of header and name, then the status.
        let (notes, size) = (word(64 + 8), word(64 + 32));
        assert_eq!(size, 2 * (20 + PRSTATUS_SIZE));
        let rip = |index: usize| {
            word(notes + index * (20 + PRSTATUS_SIZE) + 20 + PRSTATUS_REGISTERS + 16 * 8)
        };
        assert_eq!([rip(0), rip(1)], [0x1111, 0x2222]);
        // PT_LOAD: the memory.
        let load = 64 + 56;
        assert_eq!((word(load + 16), word(load + 32)), (0, 64 << 20));
        let offset = word(load + 8);
        assert_eq!(&file[offset + 0x12_3456..][..4], b"here");
        assert_eq!(file.len(), offset + (64 << 20));
        let allocated = std::fs::metadata(&path).unwrap().blocks() * 512;
        assert!(allocated < 1 << 20, "{allocated} bytes on disk");

        // A file that is there is never overwritten.
        let again = write(&path, &memory, &[]).unwrap_err();
        assert!(matches!(again, CoreDumpError::Create { .. }));
    }
}
