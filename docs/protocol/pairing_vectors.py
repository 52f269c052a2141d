#!/usr/bin/env python3
"""Checks pairing-vectors.json: written from pairing.md and the RFCs alone, without a line of Palyra.

    python3 docs/protocol/pairing_vectors.py        (needs the package `cryptography`, for Argon2id and AES-GCM-SIV)

It is the second implementation of the protocol: if page, file and crates/pki ever disagree, either this or
crates/pki/tests/vectors.rs says so. Slow and not constant-time: never use it with a real secret.
"""

import base64
import hashlib
import hmac
import json
import pathlib

from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

# --- pairing.md, section 1 ---


def sha256(data):
    return hashlib.sha256(data).digest()


def hmac256(key, data):
    return hmac.new(key, data, hashlib.sha256).digest()


def fields(*parts):
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def derive(secret, label, *context):
    return hmac256(secret, fields(label, *context))


def seal(key, purpose, context, nonce, secret):
    aad = fields(b"palyra seal v1", purpose, context)
    return b"\x01" + nonce + AESGCMSIV(key).encrypt(nonce, secret, aad)


# --- ristretto255: RFC 9496 ---

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
SQRT_M1 = pow(2, (P - 1) // 4, P)
SQRT_AD_MINUS_ONE = 25063068953384623474111414158702152701244531502492656460079210482610430750235


def absolute(x):
    return -x % P if x & 1 else x


def sqrt_ratio(u, v):
    root = u * pow(v, 3, P) * pow(u * pow(v, 7, P), (P - 5) // 8, P) % P
    check = v * root * root % P
    if check in (-u % P, -u * SQRT_M1 % P):
        root = root * SQRT_M1 % P
    return check in (u % P, -u % P), absolute(root)


INVSQRT_A_MINUS_D = sqrt_ratio(1, -1 - D)[1]


class Point:
    def __init__(self, x, y, z, t):
        self.x, self.y, self.z, self.t = x, y, z, t

    def __add__(self, other):
        a = (self.y - self.x) * (other.y - other.x)
        b = (self.y + self.x) * (other.y + other.x)
        c = 2 * self.t * other.t * D
        d = 2 * self.z * other.z
        e, f, g, h = b - a, d - c, d + c, b + a
        return Point(e * f % P, g * h % P, f * g % P, e * h % P)

    def __rmul__(self, scalar):
        total, power = Point(0, 1, 1, 0), self
        for bit in range(L.bit_length()):
            if scalar >> bit & 1:
                total = total + power
            power = power + power
        return total

    def encode(self):
        u1, u2 = (self.z + self.y) * (self.z - self.y), self.x * self.y
        inverse = sqrt_ratio(1, u1 * u2 * u2 % P)[1]
        one, two = inverse * u1 % P, inverse * u2 % P
        z = one * two * self.t % P
        x, y, denominator = self.x, self.y, two
        if self.t * z % P & 1:
            x, y, denominator = self.y * SQRT_M1 % P, self.x * SQRT_M1 % P, one * INVSQRT_A_MINUS_D
        if x * z % P & 1:
            y = -y
        return absolute(denominator * (self.z - y) % P).to_bytes(32, "little")


def decode(data):
    s = int.from_bytes(data, "little")
    assert s < P and not s & 1
    u1, u2 = (1 - s * s) % P, (1 + s * s) % P
    v = (-D * u1 * u1 - u2 * u2) % P
    square, inverse = sqrt_ratio(1, v * u2 * u2 % P)
    x = absolute(2 * s * inverse * u2 % P)
    y = u1 * inverse * inverse * u2 * v % P
    assert square and y and not x * y % P & 1
    return Point(x, y, 1, x * y % P)


BASE = decode(bytes.fromhex("e2f2ae0a6abc4e71a884a961c500515f58e30b6aa582dd8db6a65945e08d2d76"))


def elligator(data):
    t = (int.from_bytes(data, "little") & (2**255 - 1)) % P
    r = SQRT_M1 * t * t % P
    u, v = (r + 1) * (1 - D * D) % P, (-1 - r * D) * (r + D) % P
    square, s = sqrt_ratio(u, v)
    c = -1
    if not square:
        s, c = -absolute(s * t % P) % P, r
    n = c * (r - 1) * (D - 1) ** 2 - v
    w0, w1, w2, w3 = 2 * s * v, n * SQRT_AD_MINUS_ONE, 1 - s * s, 1 + s * s
    return Point(w0 * w3 % P, w2 * w1 % P, w1 * w3 % P, w0 * w2 % P)


# --- OPRF and OPAQUE: RFC 9497 and RFC 9807, with the parameters of pairing.md, section 5 ---

OPRF = b"OPRFV1-\x00-ristretto255-SHA512"


def sha512(data):
    return hashlib.sha512(data).digest()


def hmac512(key, data):
    return hmac.new(key, data, hashlib.sha512).digest()


def with_length(data):
    return len(data).to_bytes(2, "big") + data


def expand(key, info, length):
    out, block = b"", b""
    for counter in range(1, -(-length // 64) + 1):
        block = hmac512(key, block + info + bytes([counter]))
        out += block
    return out[:length]


def expand_message(message, dst):
    dst += bytes([len(dst)])
    first = sha512(bytes(128) + message + (64).to_bytes(2, "big") + b"\0" + dst)
    return sha512(first + b"\x01" + dst)


def hash_to_group(message):
    uniform = expand_message(message, b"HashToGroup-" + OPRF)
    return elligator(uniform[:32]) + elligator(uniform[32:])


def derive_key(seed, info):
    for counter in range(256):
        data = seed + with_length(info) + bytes([counter])
        key = int.from_bytes(expand_message(data, b"DeriveKeyPair" + OPRF), "little") % L
        if key:
            return key


def derive_share(seed):
    return derive_key(seed, b"OPAQUE-DeriveDiffieHellmanKeyPair")


def stretch(data):
    return Argon2id(salt=bytes(16), length=64, iterations=2, lanes=1, memory_cost=19456).derive(data)


def derive_secret(secret, label, context):
    label = b"OPAQUE-" + label
    return expand(secret, (64).to_bytes(2, "big") + bytes([len(label)]) + label + bytes([len(context)]) + context, 64)


def key_schedule(shared, preamble):
    """MAC keys of server and client, and the session key."""
    early = hmac512(bytes(64), shared)
    handshake = derive_secret(early, b"HandshakeSecret", sha512(preamble))
    session = derive_secret(early, b"SessionKey", sha512(preamble))
    return derive_secret(handshake, b"ServerMAC", b""), derive_secret(handshake, b"ClientMAC", b""), session


def shared_with(key, point):
    return (key * decode(point)).encode()


def exchange(pin, code_id, verifier, given):
    """Both sides of an exchange with their random choices given: KE1, KE2, KE3 and the session key."""
    value = lambda name: bytes.fromhex(given[name])
    scalar = lambda data: int.from_bytes(data, "little")
    assert verifier[0] == 1 and len(verifier) == 321
    oprf_seed, server_key = verifier[1:65], scalar(verifier[65:97])
    client_public, masking_key, envelope = verifier[129:161], verifier[161:225], verifier[225:]
    server_public, context = (server_key * BASE).encode(), value("context")

    # The node's first message.
    blind, share = scalar(value("client_blind")), derive_share(value("client_keyshare_seed"))
    ke1 = (blind * hash_to_group(pin)).encode() + value("client_nonce") + (share * BASE).encode()

    # The replica's answer, out of what it keeps.
    oprf_key = derive_key(expand(oprf_seed, code_id + b"OprfKey", 32), b"OPAQUE-DeriveKeyPair")
    pad = expand(masking_key, value("masking_nonce") + b"CredentialResponsePad", 128)
    masked = bytes(a ^ b for a, b in zip(pad, server_public + envelope))
    response = shared_with(oprf_key, ke1[:32]) + value("masking_nonce") + masked
    server_share = derive_share(value("server_keyshare_seed"))
    shares = value("server_nonce") + (server_share * BASE).encode()
    preamble = b"OPAQUEv1-" + with_length(context) + with_length(client_public) + ke1
    preamble += with_length(server_public) + response + shares
    secrets = [(server_share, ke1[64:]), (server_key, ke1[64:]), (server_share, client_public)]
    replica = key_schedule(b"".join(shared_with(*pair) for pair in secrets), preamble)
    server_mac = hmac512(replica[0], sha512(preamble))
    ke2 = response + shares + server_mac

    # The node opens it with the PIN alone.
    unblinded = shared_with(pow(blind, -1, L), ke2[:32])
    output = sha512(with_length(pin) + with_length(unblinded) + b"Finalize")
    password = hmac512(bytes(64), output + stretch(output))
    pad = expand(expand(password, b"MaskingKey", 64), ke2[32:64] + b"CredentialResponsePad", 128)
    opened = bytes(a ^ b for a, b in zip(pad, ke2[64:192]))
    known, nonce, tag = opened[:32], opened[32:64], opened[64:]
    client_key = derive_share(expand(password, nonce + b"PrivateKey", 32))
    client_known = (client_key * BASE).encode()
    credentials = known + with_length(known) + with_length(client_known)
    assert hmac512(expand(password, nonce + b"AuthKey", 64), nonce + credentials) == tag
    assert (known, client_known) == (server_public, client_public)
    secrets = [(share, ke2[224:256]), (share, known), (client_key, ke2[224:256])]
    node = key_schedule(b"".join(shared_with(*pair) for pair in secrets), preamble)
    assert node == replica
    return ke1, ke2, hmac512(node[1], sha512(preamble + server_mac)), node[2]


# --- the file ---


def check_pairing(given, bundle_digest):
    value = lambda name: bytes.fromhex(given[name])
    ids = [given[name].encode() for name in ("cluster_id", "method", "code_id", "node_id")]
    rest = [value(name) for name in ("server_end_point", "csr_sha256", "node_nonce", "server_nonce")]
    context = fields(b"palyra pairing v1", *ids, *rest)
    assert context == value("context")
    by_pin = given["method"] == "pin"
    transcript = context + (fields(sha256(value("ke1")), sha256(value("ke2"))) if by_pin else fields(b"", b""))
    assert transcript == value("transcript")
    key, digest = value("key"), sha256(transcript)
    assert digest == value("transcript_sha256")
    proof = lambda label, *more: hmac256(key, b"palyra pairing v1 " + label + digest + b"".join(more))
    assert proof(b"node") == value("node_proof")
    assert proof(b"server", bundle_digest) == value("server_proof")
    assert proof(b"fetch") == value("fetch_token")
    assert sha256(value("fetch_token")) == value("fetch_token_sha256")
    digits = f"{int.from_bytes(proof(b'sas')[:8], 'big') % 1_000_000:06}"
    assert f"{digits[:3]} {digits[3:]}" == given["sas"]


def check_ticket(given):
    value = lambda name: bytes.fromhex(given[name])
    ids = given["cluster_id"].encode(), given["id"].encode()
    endpoints = [endpoint.encode() for endpoint in given["endpoints"]]
    body = b"\x01" + fields(*ids, value("secret"), value("root_pin"), *endpoints)
    for prefix, name in ("palyra-ticket.", "text"), ("palyra-join.", "join_text"):
        data = body + sha256(prefix.encode() + body)[:4]
        assert prefix + base64.urlsafe_b64encode(data).decode().rstrip("=") == given[name]
    assert derive(value("secret"), b"palyra ticket v1 key", *ids) == value("key")


def check_join(given):
    value = lambda name: bytes.fromhex(given[name])
    request = sha256(
        fields(
            b"palyra join v1",
            given["cluster_id"].encode(),
            given["token_id"].encode(),
            sha256(value("replica_csr")),
            sha256(value("authority_csr")),
            given["name"].encode(),
            fields(*[address.encode() for address in given["addresses"]]),
            value("server_end_point"),
        )
    )
    assert request == value("request_sha256")
    key = derive(value("secret"), b"palyra join v1 proof key")
    assert hmac256(key, b"palyra join v1 replica" + request) == value("proof")
    answer = sha256(fields(*[bytes.fromhex(part) for part in given["answer_parts"]]))
    assert hmac256(key, b"palyra join v1 cluster" + request + answer) == value("answer_proof")
    wrap = derive(value("secret"), b"palyra join v1 wrap key")
    assert seal(wrap, b"kek-hand-over", request, value("nonce"), value("kek")) == value("wrapped_kek")


def main():
    vectors = json.loads((pathlib.Path(__file__).parent / "pairing-vectors.json").read_text())
    bundle = vectors["trust_bundle"]
    names = bundle["cluster_id"].encode(), bundle["trust_domain"].encode()
    digest = sha256(fields(b"palyra trust bundle v1", *names, *[bytes.fromhex(root) for root in bundle["roots"]]))
    assert digest.hex() == bundle["sha256"]
    for pairing in vectors["pairings"]:
        check_pairing(pairing, digest)
    check_ticket(vectors["ticket"])
    check_join(vectors["join"])
    sealed = {name: bytes.fromhex(text) for name, text in vectors["seal"].items() if name != "purpose"}
    purpose = vectors["seal"]["purpose"].encode()
    made = seal(sealed["kek"], purpose, sealed["context"], sealed["nonce"], sealed["secret"])
    assert made == sealed["blob"]
    code = vectors["pin_code"]
    pin = code["pin"].replace(" ", "").encode()
    verifier = bytes.fromhex(code["verifier"])
    made = exchange(pin, code["code_id"].encode(), verifier, code["exchange"])
    names = ("ke1", "ke2", "ke3", "session_key")
    assert [part.hex() for part in made] == [code["exchange"][name] for name in names]
    lengths = tuple(code[f"{name}_length"] for name in names[:3])
    assert tuple(len(part) for part in made[:3]) == lengths == (96, 320, 64)
    print("all vectors hold")


if __name__ == "__main__":
    main()
