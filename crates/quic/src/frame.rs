//! The bytes of a stream: a length of four bytes, big endian, and a `Frame` of that length, again and again.
//!
//! Invariants: a length over the limit is refused as soon as its four bytes are there; a message in parts is refused as
//! soon as it is over its own limit; [`Reader::next`] may be cancelled at any point and loses nothing.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use palyra_proto::quic::v1 as wire;
use palyra_proto::quic::v1::frame::Kind;
use prost::Message;
use quinn::{ConnectionError, ReadError, RecvStream, SendStream, WriteError};

use crate::{DEFAULT_MAX_FRAME_BYTES, Fault};

/// The bytes of a length.
const LENGTH: usize = 4;
/// What `Frame` adds to the bytes that it carries: a tag and a length.
const WRAPPING: usize = 16;
/// The most that is taken from the transport at once.
const CHUNK: usize = 64 * 1024;
/// A buffer that grew beyond this is let go of once it is empty.
const KEPT: usize = 64 * 1024;

/// Why a stream gives or takes no more frames.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Broken {
    /// What came is not understood, or too much.
    Fault(Fault),
    /// The other side gave this stream up.
    Stream,
    /// The connection is gone.
    Connection(ConnectionError),
}

impl From<Fault> for Broken {
    fn from(fault: Fault) -> Broken {
        Broken::Fault(fault)
    }
}

/// One frame's bytes, length first.
fn encode(kind: Kind) -> Bytes {
    let frame = wire::Frame { kind: Some(kind) };
    let length = frame.encoded_len();
    debug_assert!(length <= DEFAULT_MAX_FRAME_BYTES, "a frame of ours fits");
    let mut bytes = BytesMut::with_capacity(LENGTH + length);
    bytes.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    bytes.put(frame.encode_to_vec().as_slice());
    bytes.freeze()
}

/// Takes one frame from the front of `buffer`, if it is whole.
fn decode(buffer: &mut BytesMut, limit: usize) -> Result<Option<Kind>, Fault> {
    let Some(length) = buffer.first_chunk::<LENGTH>() else {
        return Ok(None);
    };
    let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
    if length > DEFAULT_MAX_FRAME_BYTES {
        return Err(Fault::FrameTooLong {
            bytes: length,
            limit: DEFAULT_MAX_FRAME_BYTES,
        });
    }
    if length > limit.saturating_add(WRAPPING) {
        return Err(Fault::MessageTooLong { limit });
    }
    if buffer.len() < LENGTH + length {
        return Ok(None);
    }
    buffer.advance(LENGTH);
    let frame = wire::Frame::decode(buffer.split_to(length).freeze()).map_err(|_| Fault::Malformed {
        cause: "a frame is no protobuf message of type palyra.quic.v1.Frame",
    })?;
    if buffer.is_empty() && buffer.capacity() > KEPT {
        *buffer = BytesMut::new();
    }
    let kind = frame.kind.ok_or(Fault::Malformed {
        cause: "a frame is empty, or of a kind that is not known",
    })?;
    Ok(Some(kind))
}

/// The sending half of a stream.
#[derive(Debug)]
pub struct Writer {
    stream: SendStream,
}

impl Writer {
    /// Writes to a stream.
    #[must_use]
    pub fn new(stream: SendStream) -> Writer {
        Writer { stream }
    }

    async fn frame(&mut self, kind: Kind) -> Result<(), Broken> {
        let written = self.stream.write_chunk(encode(kind)).await;
        written.map_err(|error| match error {
            WriteError::ConnectionLost(error) => Broken::Connection(error),
            WriteError::Stopped(_) | WriteError::ClosedStream | WriteError::ZeroRttRejected => Broken::Stream,
        })
    }

    /// Begins a call.
    ///
    /// # Errors
    /// A stream that takes no more; so with each method here.
    pub async fn header(&mut self, header: wire::Header) -> Result<(), Broken> {
        self.frame(Kind::Header(header)).await
    }

    /// Writes a message, in parts when it is longer than a frame may be.
    ///
    /// # Errors
    /// As with each method here.
    pub async fn message(&mut self, message: &impl Message) -> Result<(), Broken> {
        let mut bytes = Bytes::from(message.encode_to_vec());
        while bytes.len() > DEFAULT_MAX_FRAME_BYTES - WRAPPING {
            let part = bytes.split_to(DEFAULT_MAX_FRAME_BYTES - WRAPPING);
            self.frame(Kind::Part(part)).await?;
        }
        self.frame(Kind::Message(bytes)).await
    }

    /// Writes the last frame of an answer, and ends this half.
    ///
    /// # Errors
    /// As with each method here.
    pub async fn status(&mut self, status: wire::Status) -> Result<(), Broken> {
        self.frame(Kind::Status(status)).await?;
        self.finish();
        Ok(())
    }

    /// Ends this half: nothing follows what was written.
    pub fn finish(&mut self) {
        // Ended already: what is asked for.
        let _ = self.stream.finish();
    }

    /// Completes when the other side has acknowledged all that was written, after [`Writer::finish`], or is gone.
    pub async fn delivered(&mut self) {
        let _ = self.stream.stopped().await;
    }

    /// Completes when the other side wants no more of this stream, or the connection is gone.
    pub async fn unwanted(&mut self) {
        // A stream that was read to its end is no unwanted one.
        if let Ok(None) = self.stream.stopped().await {
            std::future::pending::<()>().await;
        }
    }
}

/// The receiving half of a stream.
#[derive(Debug)]
pub struct Reader {
    stream: RecvStream,
    buffer: BytesMut,
    parts: BytesMut,
    limit: usize,
}

/// What a stream brings, with the parts of a message put together.
#[derive(Debug, Clone, PartialEq)]
pub enum Item {
    /// A call begins.
    Header(wire::Header),
    /// A whole message.
    Message(Bytes),
    /// The call's end.
    Status(wire::Status),
}

impl Reader {
    /// Reads from a stream whose messages have at most `limit` bytes.
    #[must_use]
    pub fn new(stream: RecvStream, limit: usize) -> Reader {
        Reader {
            stream,
            buffer: BytesMut::new(),
            parts: BytesMut::new(),
            limit,
        }
    }

    /// From now on messages have at most `limit` bytes, and frames no more than such a message needs.
    pub fn limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// The next item; nothing once the other side has ended its half. Safe to cancel.
    ///
    /// # Errors
    /// A fault in what came, or a stream that is gone. Nothing more can be read then.
    pub async fn next(&mut self) -> Result<Option<Item>, Broken> {
        loop {
            while let Some(kind) = decode(&mut self.buffer, self.limit)? {
                if let Some(item) = self.put_together(kind)? {
                    return Ok(Some(item));
                }
            }
            match self.stream.read_chunk(CHUNK, true).await {
                Ok(Some(chunk)) => self.buffer.extend_from_slice(&chunk.bytes),
                Ok(None) if self.buffer.is_empty() && self.parts.is_empty() => return Ok(None),
                Ok(None) => {
                    let cause = "the stream ended inside of a frame or of a message";
                    return Err(Fault::Malformed { cause }.into());
                }
                Err(ReadError::ConnectionLost(error)) => return Err(Broken::Connection(error)),
                Err(_) => return Err(Broken::Stream),
            }
        }
    }

    fn put_together(&mut self, kind: Kind) -> Result<Option<Item>, Fault> {
        let limit = self.limit;
        let fits = |length: usize| {
            (length <= limit)
                .then_some(())
                .ok_or(Fault::MessageTooLong { limit })
        };
        match kind {
            Kind::Part(part) => {
                if part.is_empty() {
                    let cause = "a part of a message is empty";
                    return Err(Fault::Malformed { cause });
                }
                fits(self.parts.len() + part.len())?;
                self.parts.extend_from_slice(&part);
                Ok(None)
            }
            Kind::Message(last) if self.parts.is_empty() => {
                fits(last.len())?;
                Ok(Some(Item::Message(last)))
            }
            Kind::Message(last) => {
                fits(self.parts.len() + last.len())?;
                let mut whole = std::mem::take(&mut self.parts);
                whole.extend_from_slice(&last);
                Ok(Some(Item::Message(whole.freeze())))
            }
            Kind::Header(_) | Kind::Status(_) if !self.parts.is_empty() => Err(Fault::Malformed {
                cause: "another frame stands between the parts of a message",
            }),
            Kind::Header(header) => Ok(Some(Item::Header(header))),
            Kind::Status(status) => Ok(Some(Item::Status(status))),
        }
    }

    /// Tells the other side that nothing more of this stream is wanted.
    pub fn stop(&mut self) {
        // Ended already: what is asked for.
        let _ = self.stream.stop(crate::close::Close::Done.code());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(bytes: &[u8]) -> Result<Option<Kind>, Fault> {
        decode(&mut BytesMut::from(bytes), usize::MAX)
    }

    #[test]
    fn a_frame_reads_back_whatever_pieces_it_comes_in() {
        let header = Kind::Header(wire::Header {
            version: 1,
            method: "node.health".to_owned(),
            deadline_ms: 5,
        });
        let whole = encode(header.clone());
        // As docs/protocol/quic.md shows it.
        assert_eq!(
            hex(&whole),
            "000000130a1108011 20b6e6f64652e6865616c74681805".replace(' ', "")
        );
        let mut buffer = BytesMut::new();
        for (at, byte) in whole.iter().enumerate() {
            assert_eq!(
                decode(&mut buffer, usize::MAX),
                Ok(None),
                "{at} bytes are no frame"
            );
            buffer.put_u8(*byte);
        }
        assert_eq!(decode(&mut buffer, usize::MAX), Ok(Some(header)));
        assert!(buffer.is_empty());
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_a_byte_of_it_came() {
        let limit = DEFAULT_MAX_FRAME_BYTES;
        let over = u32::try_from(limit + 1).unwrap().to_be_bytes();
        assert_eq!(
            taken(&over),
            Err(Fault::FrameTooLong {
                bytes: limit + 1,
                limit
            })
        );
        let longest = u32::try_from(limit).unwrap().to_be_bytes();
        assert_eq!(taken(&longest), Ok(None));
        // A call of small messages does not wait for a long frame.
        let refused = decode(&mut BytesMut::from(&longest[..]), 100);
        assert_eq!(refused, Err(Fault::MessageTooLong { limit: 100 }));
    }

    #[test]
    fn garbage_and_empty_frames_are_malformed() {
        for bytes in [
            &[0, 0, 0, 2, 0xff, 0xff][..],
            &[0, 0, 0, 0],
            &[0, 0, 0, 2, 0x78, 0x01],
        ] {
            assert!(matches!(taken(bytes), Err(Fault::Malformed { .. })), "{bytes:?}");
        }
    }

    #[test]
    fn the_longest_part_of_ours_fills_a_frame_and_no_more() {
        let bytes = encode(Kind::Part(Bytes::from(vec![
            0;
            DEFAULT_MAX_FRAME_BYTES - WRAPPING
        ])));
        assert!(bytes.len() - LENGTH <= DEFAULT_MAX_FRAME_BYTES);
    }
}
