//! As much of Ethernet, IP, TCP and UDP as it takes to switch frames and to damage them on purpose.

/// A hardware address.
pub type Mac = [u8; 6];

/// Bytes of an Ethernet header without tags.
pub const HEADER: usize = 14;

const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Where a frame goes, and where it comes from; `None` when it is too short to say.
#[must_use]
pub fn addresses(frame: &[u8]) -> Option<(Mac, Mac)> {
    let to = frame.get(..6)?.try_into().ok()?;
    let from = frame.get(6..12)?.try_into().ok()?;
    (frame.len() >= HEADER).then_some((to, from))
}

/// Whether an address means more than one receiver.
#[must_use]
pub fn is_group(mac: Mac) -> bool {
    mac[0] & 1 == 1
}

/// What a transport protocol carries in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Transport {
    /// Where its header begins; its checksum counts 16-bit words from there.
    begin: usize,
    /// Where its checksum is.
    checksum: usize,
    /// Where the content begins and ends. Short frames are padded after the end.
    content: (usize, usize),
    /// Of UDP: an absent checksum is zero.
    may_lack_checksum: bool,
}

fn word(frame: &[u8], at: usize) -> Option<u16> {
    let bytes = frame.get(at..at + 2)?;
    Some(u16::from_be_bytes([bytes[0], bytes[1]]))
}

fn transport(frame: &[u8]) -> Option<Transport> {
    let (protocol, begin, end) = match frame.get(12..14)? {
        kind if kind == IPV4 => {
            let length = usize::from(frame.get(HEADER)? & 0x0f) * 4;
            // A fragment carries part of a checksum's bytes; nothing here sends any.
            if word(frame, HEADER + 6)? & 0x3fff != 0 {
                return None;
            }
            let end = HEADER + usize::from(word(frame, HEADER + 2)?);
            (*frame.get(HEADER + 9)?, HEADER + length, end)
        }
        kind if kind == IPV6 => {
            let end = HEADER + 40 + usize::from(word(frame, HEADER + 4)?);
            (*frame.get(HEADER + 6)?, HEADER + 40, end)
        }
        _ => return None,
    };
    let (checksum, content) = match protocol {
        TCP => (begin + 16, begin + usize::from(frame.get(begin + 12)? >> 4) * 4),
        UDP => (begin + 6, begin + 8),
        _ => return None,
    };
    (content <= end && end <= frame.len()).then_some(Transport {
        begin,
        checksum,
        content: (content, end),
        may_lack_checksum: protocol == UDP,
    })
}

/// Turns one bit after the Ethernet header, chosen by `draw`. False when there is none.
pub fn damage(frame: &mut [u8], draw: u64) -> bool {
    let Some(bytes) = frame.get_mut(HEADER..).filter(|bytes| !bytes.is_empty()) else {
        return false;
    };
    flip(bytes, draw);
    true
}

/// Turns one bit of what a TCP segment or UDP datagram carries and makes its checksum fit. False, and the frame as it
/// was, when it carries nothing.
pub fn damage_sealed(frame: &mut [u8], draw: u64) -> bool {
    let Some(transport) = transport(frame) else {
        return false;
    };
    let (content, end) = transport.content;
    if content == end {
        return false;
    }
    let at = content + flip_index(draw, end - content);
    let before = covered(frame, &transport, at);
    frame[at] ^= 1 << (draw & 7);
    let after = covered(frame, &transport, at);
    let Some(checksum) = word(frame, transport.checksum) else {
        return false;
    };
    if transport.may_lack_checksum && checksum == 0 {
        return true;
    }
    let mut renewed = update(checksum, before, after);
    if transport.may_lack_checksum && renewed == 0 {
        renewed = 0xffff;
    }
    frame[transport.checksum..transport.checksum + 2].copy_from_slice(&renewed.to_be_bytes());
    true
}

/// The 16-bit word of the checksum's sum in which a byte lies; a last odd byte is padded with zero.
fn covered(frame: &[u8], transport: &Transport, at: usize) -> u16 {
    let first = at - (at - transport.begin) % 2;
    let second = if first + 1 < transport.content.1 {
        frame[first + 1]
    } else {
        0
    };
    u16::from_be_bytes([frame[first], second])
}

/// A checksum after one word under it has changed (RFC 1624, equation 3).
fn update(checksum: u16, before: u16, after: u16) -> u16 {
    let sum = u32::from(!checksum) + u32::from(!before) + u32::from(after);
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    !(folded as u16)
}

fn flip_index(draw: u64, length: usize) -> usize {
    (draw >> 3) as usize % length
}

fn flip(bytes: &mut [u8], draw: u64) {
    let at = flip_index(draw, bytes.len());
    bytes[at] ^= 1 << (draw & 7);
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn mac(last: u8) -> Mac {
        [2, 0, 0, 0, 0, last]
    }

    /// An IPv4 frame with a right checksum in its transport header, padded as Ethernet pads short ones.
    pub(crate) fn ipv4(protocol: u8, content: &[u8]) -> Vec<u8> {
        let header = if protocol == TCP { 20 } else { 8 };
        let mut segment = vec![0; header];
        if protocol == TCP {
            segment[12] = 5 << 4;
        } else {
            segment[4..6].copy_from_slice(&((header + content.len()) as u16).to_be_bytes());
        }
        segment.extend_from_slice(content);
        let mut ip = vec![0; 20];
        ip[0] = 0x45;
        ip[2..4].copy_from_slice(&((20 + segment.len()) as u16).to_be_bytes());
        ip[9] = protocol;
        ip[12..20].copy_from_slice(&[10, 77, 0, 1, 10, 77, 0, 2]);
        let at = if protocol == TCP { 16 } else { 6 };
        let sum = checksum(&ip, &segment);
        segment[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        let mut frame = [mac(2), mac(1)].concat();
        frame.extend_from_slice(&IPV4);
        frame.extend(ip);
        frame.extend(segment);
        frame.resize(frame.len().max(60), 0);
        frame
    }

    /// From the definition, over the pseudo header; the checksum's own field must be zero, or the answer is zero.
    fn checksum(ip: &[u8], segment: &[u8]) -> u16 {
        let mut bytes = ip[12..20].to_vec();
        bytes.extend([0, ip[9]]);
        bytes.extend((segment.len() as u16).to_be_bytes());
        bytes.extend_from_slice(segment);
        if bytes.len() % 2 == 1 {
            bytes.push(0);
        }
        let words = bytes
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
        let mut sum: u32 = words.sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    fn verifies(frame: &[u8]) -> bool {
        let length = usize::from(word(frame, HEADER + 2).expect("a header"));
        checksum(&frame[HEADER..HEADER + 20], &frame[HEADER + 20..HEADER + length]) == 0
    }

    #[test]
    fn sealed_damage_changes_one_bit_of_the_content_and_the_checksum_still_holds() {
        for protocol in [TCP, UDP] {
            for content in [b"a".as_slice(), b"even", b"odd", &[0xff; 1001], &[0; 64]] {
                let whole = ipv4(protocol, content);
                assert!(verifies(&whole));
                for draw in (0..4096).map(|n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15)) {
                    let mut frame = whole.clone();
                    assert!(damage_sealed(&mut frame, draw));
                    let begin = HEADER + 20 + if protocol == TCP { 20 } else { 8 };
                    let carried = &frame[begin..begin + content.len()];
                    let turned: u32 = carried
                        .iter()
                        .zip(content)
                        .map(|(a, b)| (a ^ b).count_ones())
                        .sum();
                    assert_eq!(turned, 1, "one bit of the content");
                    assert!(verifies(&frame), "protocol {protocol}, {} bytes", content.len());
                }
            }
        }
    }

    #[test]
    fn what_carries_nothing_is_left_alone() {
        let arp = [mac(255).as_slice(), &mac(1), &[0x08, 0x06], &[0; 46]].concat();
        for whole in [ipv4(TCP, b""), arp, vec![0; 3], Vec::new()] {
            let mut frame = whole.clone();
            assert!(!damage_sealed(&mut frame, 77));
            assert_eq!(frame, whole);
        }
    }

    #[test]
    fn visible_damage_leaves_the_addresses_and_breaks_what_is_checked() {
        for draw in 0..2000 {
            let whole = ipv4(TCP, &[7; 40]);
            let mut frame = whole.clone();
            assert!(damage(&mut frame, draw));
            assert_eq!(addresses(&frame), addresses(&whole));
            assert_ne!(frame, whole);
        }
        assert!(!damage(&mut [0; HEADER], 5));
    }

    #[test]
    fn lengths_that_lie_are_no_transport() {
        let whole = ipv4(UDP, &[1; 100]);
        for length in 0..whole.len() {
            let mut frame = whole[..length].to_vec();
            let _ = damage_sealed(&mut frame, 9);
            let mut lies = whole.clone();
            lies[HEADER + 2] = length as u8;
            let _ = damage_sealed(&mut lies, 9);
        }
    }
}
