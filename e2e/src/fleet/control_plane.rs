//! etcd and a Kubernetes API server as plain processes: all of Kubernetes that brokers talk to.
//!
//! The programs are those of `e2e/cluster`. Who has the token may do everything; what brokers may do is proven on the whole Kubernetes.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, EcdsaSigningAlgorithm, KeyPair,
};
use uuid::Uuid;

use crate::daemon::{Daemon, run};
use crate::ports::free_port;
use crate::repository;

const READY_WITHIN: Duration = Duration::from_secs(120);

/// Running etcd and, unless it was stopped, API server.
pub(super) struct ControlPlane {
    folder: PathBuf,
    program: PathBuf,
    token: String,
    etcd: String,
    address: SocketAddr,
    api_server: Option<Daemon>,
    // Last: it ends after who uses it.
    _etcd_process: Daemon,
}

impl ControlPlane {
    pub(super) async fn start(folder: PathBuf) -> Result<Self> {
        let programs = repository().join("target/cluster/bin");
        let mut build = Command::new(repository().join("e2e/cluster/run"));
        build.arg("programs");
        run(build)
            .await
            .context("can't build the API server: e2e/cluster/run programs")?;
        let (private, public) = key_pair()?;
        fs::write(folder.join("service-account.key"), private)?;
        fs::write(folder.join("service-account.pub"), public)?;
        let token = Uuid::new_v4().simple().to_string();
        let users = format!("{token},e2e,e2e,system:masters\n");
        fs::write(folder.join("tokens"), users)?;
        let url = || format!("http://127.0.0.1:{}", free_port());
        let (etcd, peers) = (url(), url());
        let mut command = Command::new("etcd");
        command
            .arg("--data-dir")
            .arg(folder.join("etcd"))
            .args(["--listen-client-urls", &etcd])
            .args(["--advertise-client-urls", &etcd])
            .args(["--listen-peer-urls", &peers])
            .args(["--initial-advertise-peer-urls", &peers])
            .arg(format!("--initial-cluster=default={peers}"))
            // It need not survive the machine's crash, and fsync slows all who share its disk.
            .arg("--unsafe-no-fsync");
        let etcd_process = Daemon::spawn("etcd", &mut command, folder.join("etcd.log"))?;
        let mut this = Self {
            program: programs.join("kubernetes"),
            folder,
            token,
            etcd,
            address: ([127, 0, 0, 1], free_port()).into(),
            api_server: None,
            _etcd_process: etcd_process,
        };
        this.start_api_server().await?;
        Ok(this)
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn stop_api_server(&mut self) {
        self.api_server = None;
    }

    pub(super) async fn start_api_server(&mut self) -> Result<()> {
        let file = |name: &str| self.folder.join(name).display().to_string();
        let mut command = Command::new(&self.program);
        command.arg("kube-apiserver").args([
            format!("--etcd-servers={}", self.etcd),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={}", self.address.port()),
            // It makes itself a certificate there.
            format!("--cert-dir={}", file("certificates")),
            format!("--token-auth-file={}", file("tokens")),
            "--authorization-mode=AlwaysAllow".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", file("service-account.pub")),
            format!(
                "--service-account-signing-key-file={}",
                file("service-account.key")
            ),
            "--service-cluster-ip-range=10.0.0.0/24".to_owned(),
            // There are no nodes to reach it under another address.
            "--endpoint-reconciler-type=none".to_owned(),
            "--profiling=false".to_owned(),
        ]);
        let log = self.folder.join("api-server.log");
        self.api_server = Some(Daemon::spawn("kube-apiserver", &mut command, log)?);
        let client = self.client().await?;
        let begun = Instant::now();
        loop {
            let request = http::Request::get("/readyz").body(Vec::new())?;
            if client.request_text(request).await.is_ok() {
                return Ok(());
            }
            if let Some(server) = &mut self.api_server {
                let ended = server.ended()?;
                ensure!(
                    ended.is_none() && begun.elapsed() < READY_WITHIN,
                    "the API server does not answer:\n{}",
                    server.log_end()
                );
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// For whoever reaches it at `address`.
    pub(super) fn kubeconfig(&self, address: SocketAddr) -> String {
        let token = &self.token;
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: e2e\n\
             clusters: [{{name: e2e, cluster: {{server: \"https://{address}\", insecure-skip-tls-verify: true}}}}]\n\
             users: [{{name: e2e, user: {{token: {token}}}}}]\n\
             contexts: [{{name: e2e, context: {{cluster: e2e, user: e2e}}}}]\n"
        )
    }

    pub(super) async fn client(&self) -> Result<Client> {
        let kubeconfig = Kubeconfig::from_yaml(&self.kubeconfig(self.address))?;
        let options = KubeConfigOptions::default();
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await?;
        Ok(Client::try_from(config)?)
    }
}

/// A new key for signing service accounts' tokens, which no one asks for, and its public half, in PEM.
fn key_pair() -> Result<(String, String)> {
    /// What comes before the point of an uncompressed P-256 key in its SubjectPublicKeyInfo (RFC 5480).
    const PUBLIC: [u8; 26] = [
        0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08,
        0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
    ];
    const ALGORITHM: &EcdsaSigningAlgorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
    let random = SystemRandom::new();
    let private = EcdsaKeyPair::generate_pkcs8(ALGORITHM, &random)
        .ok()
        .context("the system has no random bytes")?;
    let pair = EcdsaKeyPair::from_pkcs8(ALGORITHM, private.as_ref(), &random)
        .ok()
        .context("a key that was just made can't be read")?;
    let public = [&PUBLIC, pair.public_key().as_ref()].concat();
    let pem = |kind: &str, der: &[u8]| {
        let text = STANDARD.encode(der);
        format!("-----BEGIN {kind}-----\n{text}\n-----END {kind}-----\n")
    };
    Ok((
        pem("PRIVATE KEY", private.as_ref()),
        pem("PUBLIC KEY", &public),
    ))
}
