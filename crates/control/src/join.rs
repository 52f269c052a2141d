//! How replicas come: tokens, and the one call by which a replica joins.
//!
//! Invariants: the root key is unsealed for one signature and wiped after it; a token admits one replica, and
//! its id is given before anything is signed; the key encryption key leaves only sealed under the token's
//! secret, to who proved that secret over this very request.

use palyra_pki::ca::HostNames;
use palyra_pki::join::JoinRequest;
use palyra_pki::seal::Purpose;
use palyra_pki::{JoinToken, KeyPair, Root, SpiffeId, ca as issuing, keys, layout, ticket};
use palyra_platform as platform;
use palyra_state::cluster::{
    self, Addresses, AdmitReplica, AllocateReplica, MintJoinToken, Replica as Record,
};
use palyra_state::identity::NewCertificate;
use palyra_state::{Code, Id, Read, Reject, Reply, ca, identity};
use zeroize::Zeroizing;

use crate::caller::{Caller, EnrolSource};
use crate::control::{Control, WriteInfo};
use crate::error::{Error, Refusal};
use crate::limits::REPLICA_TTL_MS;
use crate::pairing::requests::new_certificate;
use crate::selector::parse_exact_id;

/// A fresh join token. The text is shown once.
#[derive(Debug)]
pub struct MintedToken {
    /// The token's text.
    pub token: Zeroizing<String>,
    /// Names it; not secret.
    pub id: Id,
    /// Last moment at which it is good.
    pub expires_at_ms: u64,
    /// The entry.
    pub write: WriteInfo,
}

/// What a replica sends that wants to join.
#[derive(Debug, Clone)]
pub struct Join {
    /// The token's id.
    pub token_id: String,
    /// HMAC over the join transcript.
    pub proof: Vec<u8>,
    /// The replica's name.
    pub name: String,
    /// CSR for its certificate, DER.
    pub replica_csr: Vec<u8>,
    /// CSR for its authority, DER.
    pub authority_csr: Vec<u8>,
    /// Replica to replica, `host:port`.
    pub peer_addr: String,
    /// gRPC for nodes and operators, `host:port`.
    pub node_addr: String,
    /// Enrolment, `host:port`.
    pub enrol_addr: String,
    /// Metrics and health, `host:port`.
    pub metrics_addr: String,
}

/// What it gets.
#[derive(Debug, Clone)]
pub struct Joined {
    /// Its id.
    pub replica_id: u64,
    /// The root that signs, DER.
    pub root_certificate: Vec<u8>,
    /// The other root that is trusted while the root is rotated, DER.
    pub more_roots: Vec<Vec<u8>>,
    /// DER.
    pub authority_certificate: Vec<u8>,
    /// DER; issued under the root, so that it depends on no other replica's authority.
    pub replica_certificate: Vec<u8>,
    /// The key encryption key, sealed under the token's secret.
    pub wrapped_kek: Vec<u8>,
    /// The members, itself included.
    pub peers: Vec<Record>,
    /// HMAC over the transcript and the parts of this answer: only who knows the token's secret can make it.
    pub proof: Vec<u8>,
}

struct Signed {
    root: u32,
    authority: issuing::IssuedCert,
    replica: issuing::IssuedCert,
}

impl Control {
    /// Mints a token for a replica of this name. The caller is an admin.
    ///
    /// # Errors
    /// What the state machine refuses; [`Refusal::ShownOnce`] when the request id made a token before.
    pub async fn mint_join_token(
        &self,
        caller: &Caller,
        request_id: &str,
        name: &str,
        ttl_ms: u64,
    ) -> Result<MintedToken, Error> {
        let request_id = self.request_id(request_id)?;
        let id = self.fresh_id();
        let token = JoinToken {
            cluster_id: self.cluster_id().to_string(),
            id: id.to_string(),
            secret: ticket::Secret::generate(&mut platform::fill_random),
            root_pin: self.root_pin()?,
            endpoints: self.enrol_endpoints(),
        };
        let text = token
            .to_text()
            .map_err(|error| Error::Internal(format!("join token: {error}")))?;
        let (context, secret) = (token.id.as_bytes(), token.secret.as_bytes());
        let sealed = self
            .keys()
            .kek
            .seal(Purpose::JoinSecret, context, secret, &mut platform::fill_random);
        let sealed = sealed.map_err(|error| Error::Internal(error.to_string()))?;
        let command = MintJoinToken {
            token_id: id,
            secret_key_sealed: sealed.into(),
            name: name.to_owned(),
            ttl_ms,
        };
        let written = self.propose(request_id, caller.actor(), command).await?;
        let Reply::TokenMinted(minted) = written.reply else {
            return Err(self.odd_reply("cluster.mint_join_token"));
        };
        if minted.token_id != id {
            return Err(Refusal::ShownOnce {
                what: format!("join token {}", minted.token_id),
            }
            .into());
        }
        Ok(MintedToken {
            token: text,
            id,
            expires_at_ms: minted.expires_at,
            write: written.info,
        })
    }

    /// Lets a replica in: checks its proof, gives it an id, signs its authority and certificate, and admits
    /// it. It becomes a learner and then a voter by the leader's own doing.
    ///
    /// # Errors
    /// [`Refusal::WrongJoinProof`], and what the state machine refuses: token used, expired, of another name.
    pub async fn join(&self, source: &EnrolSource, join: Join) -> Result<Joined, Error> {
        let token_id = parse_exact_id("token_id", &join.token_id)?;
        for (field, csr) in [
            ("replica_csr", &join.replica_csr),
            ("authority_csr", &join.authority_csr),
        ] {
            keys::check_csr(csr)
                .map_err(|error| Error::invalid(field, error.to_string(), "send a P-256 CSR in DER form"))?;
        }
        for (field, address) in [
            ("peer_addr", &join.peer_addr),
            ("node_addr", &join.node_addr),
            ("enrol_addr", &join.enrol_addr),
        ] {
            ticket::check_endpoint(address)
                .map_err(|error| Error::invalid(field, error.to_string(), "send host:port"))?;
        }
        self.barrier().await?;
        let secret = self.token_secret(token_id)?;
        let (cluster_id, token_text) = (self.cluster_id().to_string(), token_id.to_string());
        let addresses = [
            join.peer_addr.clone(),
            join.node_addr.clone(),
            join.enrol_addr.clone(),
            join.metrics_addr.clone(),
        ];
        let asked = JoinRequest {
            cluster_id: &cluster_id,
            token_id: &token_text,
            replica_csr: &join.replica_csr,
            authority_csr: &join.authority_csr,
            name: &join.name,
            addresses: &addresses,
            server_end_point: source.end_point,
        };
        if !asked.check_proof(&secret, &join.proof) {
            tracing::warn!(token = %token_id, source = source.address, "a join token was proved wrongly");
            return Err(Refusal::WrongJoinProof.into());
        }
        let wrapped_kek = asked
            .wrap_kek(&secret, &self.keys().kek, &mut platform::fill_random)
            .map_err(|error| Error::Internal(error.to_string()))?;
        let replica_id = self.admit(token_id, &join).await?;
        let mut joined = self.joined(replica_id, wrapped_kek)?;
        let id = replica_id.to_string();
        let mut parts: Vec<&[u8]> = vec![
            cluster_id.as_bytes(),
            self.trust_domain().as_str().as_bytes(),
            id.as_bytes(),
            &joined.root_certificate,
            &joined.authority_certificate,
            &joined.replica_certificate,
            &joined.wrapped_kek,
        ];
        parts.extend(joined.more_roots.iter().map(Vec::as_slice));
        joined.proof = asked.answer_proof(&secret, &parts).to_vec();
        Ok(joined)
    }

    /// The id under which the replica is admitted, now or by another try whose answer was lost: who proves
    /// the token again with the same authority key is the same replica.
    async fn admit(&self, token_id: Id, join: &Join) -> Result<u64, Error> {
        // An earlier try, at another replica, may still be under way and come first with either of its entries.
        // And the root may have been rotated since it signed.
        let overtaken = |reject: &Reject| {
            matches!(
                reject.kind(),
                Code::JoinTokenUsed | Code::ReplicaStatusChange | Code::BadAuthority
            )
        };
        for _ in 0..2 {
            match self.try_admit(token_id, join).await {
                Err(Error::Rejected(reject)) if overtaken(&reject) => self.barrier().await?,
                tried => return tried,
            }
        }
        self.try_admit(token_id, join).await
    }

    async fn try_admit(&self, token_id: Id, join: &Join) -> Result<u64, Error> {
        let earlier = self.begun(token_id, join)?;
        if let Some(record) = earlier.as_ref().filter(|record| record.is_member()) {
            return Ok(record.id);
        }
        let replica_id = match earlier {
            Some(record) => record.id,
            None => self.allocate(token_id, join).await?,
        };
        let signed = self.sign_replica(join, replica_id)?;
        let admit = AdmitReplica {
            replica_id,
            authority_cert_der: signed.authority.der.clone().into(),
            certificate: NewCertificate {
                authority_number: signed.root,
                ..new_certificate(&signed.replica, 0)?
            },
            root: signed.root,
        };
        let written = self.propose(self.fresh_id(), self.as_replica(), admit).await?;
        self.applied(written.receipt).await?;
        Ok(replica_id)
    }

    /// What an earlier try with this token came to, if it was this replica's.
    fn begun(&self, token_id: Id, join: &Join) -> Result<Option<Record>, Error> {
        let view = self.replica().view();
        let Some(token) = cluster::join_token(&view, token_id).filter(|token| token.used_by != 0) else {
            return Ok(None);
        };
        let Some(record) = cluster::replica(&view, token.used_by) else {
            return Ok(None);
        };
        let key = keys::check_csr(&join.authority_csr)
            .map(|key| key.spki_sha256)
            .ok();
        let recorded = palyra_pki::identity::spki_sha256(&record.authority_cert_der).ok();
        let same = record.name == join.name && record.status() != cluster::ReplicaStatus::Removed;
        if same && (record.authority_cert_der.is_empty() || key == recorded) {
            return Ok(Some(record));
        }
        Err(Reject::new(Code::JoinTokenUsed, [&token_id, &token.used_by]).into())
    }

    async fn allocate(&self, token_id: Id, join: &Join) -> Result<u64, Error> {
        let allocate = AllocateReplica {
            token_id,
            name: join.name.clone(),
            addresses: addresses_of(join),
        };
        // Under an id of ours: the token itself says what became of an earlier try.
        let written = self.propose(self.fresh_id(), self.as_replica(), allocate).await?;
        let Reply::ReplicaAllocated(allocated) = written.reply else {
            return Err(self.odd_reply("cluster.allocate_replica"));
        };
        self.applied(written.receipt).await?;
        Ok(allocated.replica_id)
    }

    /// The answer to a replica that is admitted, with the certificates that the registry has.
    fn joined(&self, replica_id: u64, wrapped_kek: Vec<u8>) -> Result<Joined, Error> {
        let view = self.replica().view();
        let missing = || Error::Internal(format!("replica {replica_id} is not where it was written"));
        let record = cluster::replica(&view, replica_id).ok_or_else(missing)?;
        let certificate =
            identity::certificate_by_fingerprint(&view, record.certificate).ok_or_else(missing)?;
        let mut roots = ca::trusted_roots(&view).into_iter().map(|root| root.der.to_vec());
        Ok(Joined {
            replica_id,
            root_certificate: roots.next().ok_or_else(missing)?,
            more_roots: roots.collect(),
            authority_certificate: record.authority_cert_der.to_vec(),
            replica_certificate: certificate.der.to_vec(),
            wrapped_kek,
            peers: cluster::replicas(&view)
                .into_iter()
                .filter(Record::is_member)
                .collect(),
            proof: Vec::new(),
        })
    }

    fn token_secret(&self, token_id: Id) -> Result<ticket::Secret, Error> {
        let token = cluster::join_token(&self.replica().view(), token_id)
            .ok_or_else(|| Reject::new(Code::NoSuchJoinToken, [&token_id]))?;
        let context = token_id.to_string();
        let opened = self
            .keys()
            .kek
            .open(Purpose::JoinSecret, context.as_bytes(), &token.secret_key_sealed);
        let opened = opened.map_err(|error| Error::Internal(format!("join token {token_id}: {error}")))?;
        ticket::Secret::from_bytes(&opened).map_err(|error| Error::Internal(error.to_string()))
    }

    /// Signs with the root. The key is in memory for the time of this call only.
    fn sign_replica(&self, join: &Join, replica_id: u64) -> Result<Signed, Error> {
        let internal = |cause: String| Error::Internal(format!("signing replica {replica_id}: {cause}"));
        let (root_number, root) = self.open_root()?;
        let now_ms = platform::wall_ms();
        let authority = root
            .sign_authority(
                &join.authority_csr,
                replica_id,
                now_ms,
                &mut platform::fill_random,
            )
            .map_err(|error| internal(error.to_string()))?;
        let id = SpiffeId::replica(self.trust_domain().clone(), replica_id)
            .map_err(|error| internal(error.to_string()))?;
        let listens = [
            &join.peer_addr,
            &join.node_addr,
            &join.enrol_addr,
            &join.metrics_addr,
        ];
        let hosts = listens
            .into_iter()
            .filter_map(|address| address.rsplit_once(':'))
            .map(|(host, _)| host);
        let names = HostNames::from_hosts(hosts);
        let csr = &join.replica_csr;
        let replica = root
            .issue_from_csr(
                csr,
                &id,
                REPLICA_TTL_MS,
                &names,
                now_ms,
                &mut platform::fill_random,
            )
            .map_err(|error| internal(error.to_string()))?;
        Ok(Signed {
            root: root_number,
            authority,
            replica,
        })
    }

    /// The root that signs now, and its number.
    pub(crate) fn open_root(&self) -> Result<(u32, Root), Error> {
        let view = self.replica().view();
        let record =
            ca::root(&view, ca::ca(&view).issuing).ok_or(Error::Unavailable { leader_hint: None })?;
        Ok((record.number, self.open_root_of(&record)?))
    }

    /// A root, with its key.
    pub(crate) fn open_root_of(&self, record: &ca::Root) -> Result<Root, Error> {
        let context = layout::root_context(&self.cluster_id().to_string());
        let internal = |cause: String| Error::Internal(format!("the key of root {}: {cause}", record.number));
        let opened = self
            .keys()
            .kek
            .open(Purpose::RootKey, &context, &record.key_sealed);
        let opened = opened.map_err(|error| internal(error.to_string()))?;
        let key = KeyPair::from_pkcs8(&opened).map_err(|error| internal(error.to_string()))?;
        Root::open(record.der.to_vec(), key).map_err(|error| internal(error.to_string()))
    }

    /// SHA-256 of the root's public key info: what tickets and join tokens pin.
    pub(crate) fn root_pin(&self) -> Result<[u8; 32], Error> {
        let root = cluster_of(&self.replica().view())?.root_cert_der;
        palyra_pki::identity::spki_sha256(&root)
            .map_err(|error| Error::Internal(format!("the root in the state is unusable: {error}")))
    }

    /// Enrol listeners for tickets and join tokens, this replica's first.
    pub(crate) fn enrol_endpoints(&self) -> Vec<String> {
        let listening = self.endpoints().into_iter().map(|endpoint| endpoint.enrol_addr);
        listening
            .filter(|address| !address.is_empty())
            .take(ticket::MAX_ENDPOINTS)
            .collect()
    }
}

fn addresses_of(join: &Join) -> Addresses {
    Addresses {
        peer: join.peer_addr.clone(),
        node: join.node_addr.clone(),
        enrol: join.enrol_addr.clone(),
        // A replica announces it with its first start.
        quic: String::new(),
        http: String::new(),
        metrics: join.metrics_addr.clone(),
    }
}

fn cluster_of(view: &dyn Read) -> Result<cluster::Cluster, Error> {
    cluster::cluster(view).ok_or(Error::Unavailable { leader_hint: None })
}
