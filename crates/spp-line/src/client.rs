//! A station's client of the daemon.

use std::path::Path;

use spp_format::names::ChipId;
use spp_proto::get_session_request::Session;
use spp_proto::line_client::LineClient;
use spp_proto::{
    AbortRequest, AssembleRequest, AssembleResponse, CompleteRequest, CompleteResponse, GetSessionRequest,
    GetSessionResponse,
};
use tonic::transport::Channel;

use super::LineError;
use super::connection::{Tls, connect, parse_server, verify_daemon};
use super::retry::{CallFailure, RetryPolicy};

/// A station's client of the daemon: mutual TLS, a deadline for each call, and retries of temporary failures (see
/// [`RetryPolicy`]). Every call is idempotent, so a station that was interrupted repeats it. Clones share the connection, which
/// reconnects by itself.
#[derive(Clone)]
pub struct StationClient {
    line: LineClient<Channel>,
    retry_policy: RetryPolicy,
}

impl StationClient {
    /// Connects to the station listener of the daemon at `server` (`https://HOST:PORT`) and checks that it accepts this station.
    /// Waits for a daemon that is still starting, up to [`RetryPolicy::retry_for`].
    ///
    /// `credentials` is the directory that `sppctl station enroll` wrote: `certificate.pem`, `key.pem` (read only by its owner)
    /// and `ca.pem`.
    pub async fn connect(server: &str, credentials: &Path, retry_policy: RetryPolicy) -> Result<Self, LineError> {
        let server = parse_server(server).map_err(|problem| LineError::Usage(format!("{server}: {problem}")))?;
        let endpoint = Tls::mutual(credentials)?.endpoint(&server)?;
        let mut channels = connect(&endpoint, 1, &retry_policy).await?;
        let channel = channels.swap_remove(0);
        verify_daemon(&server, &channel, &retry_policy).await?;
        Ok(Self::new(channel, retry_policy))
    }

    pub(super) fn new(channel: Channel, retry_policy: RetryPolicy) -> Self {
        Self { line: LineClient::new(channel), retry_policy }
    }

    /// Orders the certificate and the keys of a device. A repeated order returns the same package until the device is complete.
    pub async fn assemble(&self, request: AssembleRequest) -> Result<AssembleResponse, CallFailure> {
        self.assemble_counting(request, &mut 0).await
    }

    /// Returns the device's backup and its key confirmation. The record of the device is public, and its key pair erased from the
    /// processing point, before this returns. A repeated call returns the same receipt.
    pub async fn complete(&self, request: CompleteRequest) -> Result<CompleteResponse, CallFailure> {
        self.complete_counting(request, &mut 0).await
    }

    /// Aborts a session that is not complete: destroys its key pair, and frees its chip and identity.
    pub async fn abort(&self, request: AbortRequest) -> Result<(), CallFailure> {
        let attempt = || {
            let (mut line, request) = (self.line.clone(), self.retry_policy.request(request.clone()));
            async move { line.abort(request).await }
        };
        self.retry_policy.call("Abort", &mut 0, attempt).await.map(drop)
    }

    /// The newest session of a chip; `NOT_FOUND` if it has none.
    pub async fn session_of_chip(&self, chip: &ChipId) -> Result<GetSessionResponse, CallFailure> {
        self.session_of_chip_counting(chip, &mut 0).await
    }

    pub(super) async fn assemble_counting(
        &self,
        request: AssembleRequest,
        retries: &mut u32,
    ) -> Result<AssembleResponse, CallFailure> {
        let attempt = || {
            let (mut line, request) = (self.line.clone(), self.retry_policy.request(request.clone()));
            async move { line.assemble(request).await }
        };
        self.retry_policy.call("Assemble", retries, attempt).await
    }

    pub(super) async fn complete_counting(
        &self,
        request: CompleteRequest,
        retries: &mut u32,
    ) -> Result<CompleteResponse, CallFailure> {
        let attempt = || {
            let (mut line, request) = (self.line.clone(), self.retry_policy.request(request.clone()));
            async move { line.complete(request).await }
        };
        self.retry_policy.call("Complete", retries, attempt).await
    }

    pub(super) async fn session_of_chip_counting(
        &self,
        chip: &ChipId,
        retries: &mut u32,
    ) -> Result<GetSessionResponse, CallFailure> {
        let request = GetSessionRequest { session: Some(Session::ChipId(chip.as_bytes().to_vec())) };
        let attempt = || {
            let (mut line, request) = (self.line.clone(), self.retry_policy.request(request.clone()));
            async move { line.get_session(request).await }
        };
        self.retry_policy.call("GetSession", retries, attempt).await
    }
}
