//! Why a side closes a connection: the application error code of CONNECTION_CLOSE, and of streams that are given up.
//!
//! Invariant: a number is never used again for something else. The reason phrase beside it is for people.

use quinn::VarInt;

/// Why a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Close {
    /// The side that closes has no more to do.
    Done,
    /// There are too many connections; fault E1065.
    Busy,
    /// A newer connection of the same identity took its place.
    Replaced,
    /// The peer broke the protocol.
    Protocol,
    /// The device, the operator or the certificate is revoked.
    Revoked,
    /// The certificate is over.
    Expired,
    /// The replica is about to stop.
    Draining,
    /// The replica has not heard from a quorum for too long.
    Stale,
    /// Nothing was heard for too long.
    Silent,
    /// The peer does not read.
    SlowReader,
    /// A newer session of the same device took over.
    Superseded,
    /// A reason that this release has no name for.
    Other(u64),
}

impl Close {
    const NAMED: [(u32, Close, &'static str); 11] = [
        (0x00, Close::Done, "done"),
        (0x01, Close::Busy, "busy"),
        (0x02, Close::Replaced, "replaced"),
        (0x03, Close::Protocol, "protocol"),
        (0x10, Close::Revoked, "revoked"),
        (0x11, Close::Expired, "expired"),
        (0x12, Close::Draining, "draining"),
        (0x13, Close::Stale, "stale"),
        (0x14, Close::Silent, "silent"),
        (0x15, Close::SlowReader, "slow_reader"),
        (0x16, Close::Superseded, "superseded"),
    ];

    /// The number on the wire.
    #[must_use]
    pub fn code(self) -> VarInt {
        let named = Self::NAMED.iter().find(|(_, close, _)| *close == self);
        match (named, self) {
            (Some((code, _, _)), _) => VarInt::from_u32(*code),
            (None, Close::Other(code)) => VarInt::from_u64(code).unwrap_or(VarInt::MAX),
            (None, _) => VarInt::MAX,
        }
    }

    /// From the number on the wire.
    #[must_use]
    pub fn of_code(code: VarInt) -> Close {
        let code = code.into_inner();
        let named = Self::NAMED
            .iter()
            .find(|(number, _, _)| u64::from(*number) == code);
        named.map_or(Close::Other(code), |(_, close, _)| *close)
    }

    /// From the word that a session's goodbye has.
    #[must_use]
    pub fn of_word(word: &str) -> Close {
        let named = Self::NAMED.iter().find(|(_, _, name)| *name == word);
        named.map_or(Close::Done, |(_, close, _)| *close)
    }

    /// The word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        let named = Self::NAMED.iter().find(|(_, close, _)| *close == self);
        named.map_or("a reason that this release does not know", |(_, _, name)| name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_words_read_back() {
        for (code, close, word) in Close::NAMED {
            assert_eq!(close.code(), VarInt::from_u32(code));
            assert_eq!(Close::of_code(VarInt::from_u32(code)), close);
            assert_eq!((Close::of_word(word), close.as_str()), (close, word));
        }
        assert_eq!(Close::of_code(VarInt::from_u32(999)), Close::Other(999));
        assert_eq!(Close::Other(999).code(), VarInt::from_u32(999));
        assert_eq!(Close::of_word("lost"), Close::Done);
    }
}
