//! The one way randomness enters this crate.
//!
//! Invariant: nothing here decides where bytes come from. Production passes the operating system's generator,
//! a simulation passes a seeded one and gets the same keys and secrets again.

use rand::{CryptoRng, RngCore};

/// A source of cryptographic randomness that the caller owns.
///
/// Any `FnMut(&mut [u8])` is one, so `&mut platform::fill_random` can be passed as it is.
pub trait Entropy {
    /// Fills `out` with bytes that nobody can predict. It can't fail: a caller that has no randomness left
    /// must stop.
    fn fill(&mut self, out: &mut [u8]);
}

impl<F: FnMut(&mut [u8])> Entropy for F {
    fn fill(&mut self, out: &mut [u8]) {
        self(out);
    }
}

/// Draws a fixed number of bytes.
pub(crate) fn draw<const N: usize>(rng: &mut dyn Entropy) -> [u8; N] {
    let mut out = [0u8; N];
    rng.fill(&mut out);
    out
}

/// [`Entropy`] in the shape that `opaque-ke` asks for.
pub(crate) struct Adapter<'a>(pub(crate) &'a mut dyn Entropy);

impl RngCore for Adapter<'_> {
    fn next_u32(&mut self) -> u32 {
        u32::from_le_bytes(draw(self.0))
    }

    fn next_u64(&mut self) -> u64 {
        u64::from_le_bytes(draw(self.0))
    }

    fn fill_bytes(&mut self, dest: &mut [u8]) {
        self.0.fill(dest);
    }

    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), rand::Error> {
        self.0.fill(dest);
        Ok(())
    }
}

// The trait's contract is that of `CryptoRng`: bytes nobody can predict.
impl CryptoRng for Adapter<'_> {}
