//! Device configuration space as a run of bytes (virtio 1.2, 2.5).

/// Serves a read at `offset` from the bytes of a configuration space. Bytes of `data` that lie
/// past the end of the space are left as they are.
pub fn read(space: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| space.get(offset..))
        .unwrap_or_default();
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests {
    use super::read;

    #[test]
    fn reads_stop_at_the_end_of_the_space() {
        let mut data = [0xff; 4];
        read(&[1, 2, 3], 1, &mut data);
        assert_eq!(data, [2, 3, 0xff, 0xff]);

        for offset in [3, 4, u64::MAX] {
            let mut data = [0; 8];
            read(&[1, 2, 3], offset, &mut data);
            assert_eq!(data, [0; 8]);
        }
    }
}
