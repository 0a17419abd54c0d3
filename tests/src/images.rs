//! Disk images and kernels made by hand.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

/// Writes an empty qcow2 image whose content is that of the raw image `backing`.
///
/// # Panics
/// It cannot be written.
pub fn write_qcow2_overlay(path: &Path, backing: &Path) {
    let size = fs::metadata(backing).unwrap().len();
    write_qcow2(path, backing, "raw", size);
}

/// Writes an empty qcow2 image whose content is that of the qcow2 image `backing`.
///
/// # Panics
/// It cannot be written.
pub fn write_second_qcow2_overlay(path: &Path, backing: &Path) {
    let mut header = [0; 32];
    File::open(backing)
        .unwrap()
        .read_exact(&mut header)
        .unwrap();
    let size = u64::from_be_bytes(header[24..32].try_into().unwrap());
    write_qcow2(path, backing, "qcow2", size);
}

/// Writes an empty qcow2 image of version 3.
///
/// Four clusters of 64 KiB (QEMU's docs/interop/qcow2.rst): header, refcount table, refcount
/// block, L1 table.
fn write_qcow2(path: &Path, backing: &Path, format: &str, size: u64) {
    const CLUSTER: u64 = 1 << 16;
    /// Guest bytes that one entry of the L1 table covers: an L2 table of 8192 clusters.
    const L1_COVERS: u64 = CLUSTER / 8 * CLUSTER;
    let backing = backing.to_str().unwrap();
    let l1_size = u32::try_from(size.div_ceil(L1_COVERS)).unwrap();
    let mut image = vec![0; (4 * CLUSTER) as usize];

    let mut header = Vec::new();
    header.extend_from_slice(b"QFI\xfb");
    header.extend_from_slice(&3u32.to_be_bytes());
    // After the header and its extensions: the format of the backing file, and the end.
    let name_offset = 104u64 + 16 + 8;
    header.extend_from_slice(&name_offset.to_be_bytes());
    header.extend_from_slice(&u32::try_from(backing.len()).unwrap().to_be_bytes());
    header.extend_from_slice(&CLUSTER.ilog2().to_be_bytes());
    header.extend_from_slice(&size.to_be_bytes());
    header.extend_from_slice(&0u32.to_be_bytes());
    header.extend_from_slice(&l1_size.to_be_bytes());
    header.extend_from_slice(&(3 * CLUSTER).to_be_bytes());
    header.extend_from_slice(&CLUSTER.to_be_bytes());
    header.extend_from_slice(&1u32.to_be_bytes());
    header.extend_from_slice(&[0; 12]);
    // No feature bits, refcounts of 2^4 bits, and the length of this header.
    header.extend_from_slice(&[0; 24]);
    header.extend_from_slice(&4u32.to_be_bytes());
    header.extend_from_slice(&104u32.to_be_bytes());
    header.extend_from_slice(&0xE279_2ACA_u32.to_be_bytes());
    header.extend_from_slice(&u32::try_from(format.len()).unwrap().to_be_bytes());
    let mut padded = [0; 8];
    padded[..format.len()].copy_from_slice(format.as_bytes());
    header.extend_from_slice(&padded);
    header.extend_from_slice(&[0; 8]);
    assert_eq!(header.len() as u64, name_offset);
    header.extend_from_slice(backing.as_bytes());
    image[..header.len()].copy_from_slice(&header);

    let table = CLUSTER as usize;
    image[table..table + 8].copy_from_slice(&(2 * CLUSTER).to_be_bytes());
    let block = 2 * CLUSTER as usize;
    for cluster in 0..4 {
        let at = block + 2 * cluster;
        image[at..at + 2].copy_from_slice(&1u16.to_be_bytes());
    }
    File::create_new(path).unwrap().write_all(&image).unwrap();
}

/// An ELF kernel of one instruction: UD2, which with no interrupt table is a triple fault.
pub fn faulting_kernel() -> Vec<u8> {
    elf(0x10_0000, &[0x0f, 0x0b])
}

/// A Linux program that is all machine code.
pub fn program(code: &[u8]) -> Vec<u8> {
    // At the place in its page that it has in the file.
    elf(0x10_0000 + u64::from(HEADERS), code)
}

/// Size of the headers of [`elf`].
const HEADERS: u16 = 64 + 56;

/// An ELF file that starts with the first byte of its code, loaded to `address`.
fn elf(address: u64, code: &[u8]) -> Vec<u8> {
    let mut elf = Vec::new();
    // The file header (System V ABI, chapter 4): 64 bits, little-endian, executable, x86-64.
    elf.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend_from_slice(&2u16.to_le_bytes());
    elf.extend_from_slice(&62u16.to_le_bytes());
    elf.extend_from_slice(&1u32.to_le_bytes());
    for word in [address, 64, 0] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.extend_from_slice(&0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    // One segment to load, readable and executable.
    elf.extend_from_slice(&1u32.to_le_bytes());
    elf.extend_from_slice(&5u32.to_le_bytes());
    let len = code.len() as u64;
    for word in [u64::from(HEADERS), address, address, len, len, 0x1000] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    assert_eq!(elf.len(), usize::from(HEADERS));
    elf.extend_from_slice(code);
    elf
}
