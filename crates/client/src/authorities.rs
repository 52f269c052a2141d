//! Calls about the cluster's authorities, and how an operator's credential follows the cluster's roots.
//!
//! Invariant: a bundle is acknowledged only after it is in the credential's file.

use std::path::Path;
use std::time::Duration;

use palyra_pki::{Credential, TrustBundle, TrustDomain};
use palyra_proto::ca::v1::{
    AdvanceRootRequest, AdvanceRootResponse, BeginRootRequest, BeginRootResponse, RevertRootRequest,
    RevertRootResponse, RotateAuthorityRequest, RotateAuthorityResponse, StatusRequest, StatusResponse,
    TrustRequest, TrustResponse, ca_service_client::CaServiceClient,
};
use tonic::transport::Channel;

use crate::client::{Client, Mutation};
use crate::context::{read_credential, write_private};
use crate::error::{Class, Error};
use crate::services::MAX_ANSWER;

fn ca(channel: Channel) -> CaServiceClient<Channel> {
    CaServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

impl Client {
    /// How the authorities are; names at most `names` nodes that have not acknowledged the trust bundle.
    pub async fn ca_status(&self, names: u32) -> Result<StatusResponse, Error> {
        let request = StatusRequest {
            read: Some(self.read_options()),
            names,
        };
        self.read(|channel| async move { ca(channel).status(request).await })
            .await
    }

    /// Says which generation of the trust bundle is held; answers a newer one.
    pub async fn trust(&self, generation: u64) -> Result<TrustResponse, Error> {
        self.read(|channel| async move { ca(channel).trust(TrustRequest { generation }).await })
            .await
    }

    /// Brings the credential in `path` up to the cluster's trust bundle, and acknowledges it. Answers the new
    /// generation when something changed.
    ///
    /// # Errors
    /// Those of [`Client::trust`], and when the file can't be read or written.
    pub async fn follow_trust(&self, path: &Path) -> Result<Option<u64>, Error> {
        let held = read_credential(path)?;
        let answer = self.trust(held.trust_generation).await?;
        if answer.generation <= held.trust_generation || answer.roots.is_empty() {
            return Ok(None);
        }
        let unusable = |cause: String| {
            let message = format!("the cluster's trust bundle is unusable: {cause}");
            Error::local(Class::Denied, message, "look at palyra ca status")
        };
        let roots = answer.roots.iter().map(|root| root.to_vec()).collect();
        let next = updated(&held, roots, answer.generation).map_err(unusable)?;
        let text = next.to_json().map_err(|error| unusable(error.to_string()))?;
        write_private(path, text.as_bytes())?;
        self.trust(answer.generation).await?;
        Ok(Some(answer.generation))
    }

    /// Asks a replica, or with 0 all of them, for a new authority.
    pub async fn rotate_authority(
        &self,
        request: RotateAuthorityRequest,
    ) -> Result<RotateAuthorityResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            ca(channel).rotate_authority(request).await
        })
        .await
    }

    /// Begins a rotation of the root.
    pub async fn begin_root(&self, request: BeginRootRequest) -> Result<BeginRootResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            ca(channel).begin_root(request).await
        })
        .await
    }

    /// Goes on to the next phase of the rotation of the root.
    pub async fn advance_root(&self, request: AdvanceRootRequest) -> Result<AdvanceRootResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            ca(channel).advance_root(request).await
        })
        .await
    }

    /// Goes back one phase of the rotation of the root.
    pub async fn revert_root(&self, request: RevertRootRequest) -> Result<RevertRootResponse, Error> {
        self.mutate(request, Duration::ZERO, |channel, request| async move {
            ca(channel).revert_root(request).await
        })
        .await
    }
}

fn updated(held: &Credential, roots: Vec<Vec<u8>>, generation: u64) -> Result<Credential, String> {
    let domain = TrustDomain::new(&held.trust_domain).map_err(|error| error.to_string())?;
    let trust = TrustBundle::new(&held.cluster_id, domain, roots).map_err(|error| error.to_string())?;
    held.with_trust(&trust, generation)
        .map_err(|error| error.to_string())
}

impl Mutation for RotateAuthorityRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for BeginRootRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for AdvanceRootRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}

impl Mutation for RevertRootRequest {
    fn request_id(&mut self) -> &mut String {
        &mut self.request_id
    }
}
