//! Random numbers, the same for the same seed.

/// The xorshift64* generator (Vigna, "An experimental exploration of Marsaglia's xorshift
/// generators, scrambled").
pub struct Chance(u64);

impl Chance {
    /// A generator that starts from `seed`.
    pub fn new(seed: u64) -> Self {
        // Zero is the one state that it never leaves.
        Self(seed ^ 0x9e37_79b9_7f4a_7c15 | 1)
    }

    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`, which is not zero.
    pub fn below(&mut self, limit: u64) -> u64 {
        (self.any() >> 11) % limit
    }

    /// True once in `times` times.
    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// One of these.
    pub fn choice<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A number of the kind that breaks arithmetic, or any.
    pub fn number(&mut self) -> u64 {
        const EDGES: [u64; 16] = [
            0,
            1,
            2,
            0xff,
            0x100,
            0x200,
            0xfff,
            0x1000,
            0x7fff,
            0xffff,
            0x1_0000,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            0x7fff_ffff_ffff_ffff,
            u64::MAX,
        ];
        match self.below(3) {
            0 => self.choice(&EDGES),
            1 => self
                .choice(&EDGES)
                .wrapping_add(self.below(5))
                .wrapping_sub(2),
            _ => {
                let shift = self.below(64);
                self.any() >> shift
            }
        }
    }
}
