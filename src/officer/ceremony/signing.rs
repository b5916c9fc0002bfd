//! Creates and rotates signing keys with their certificates or certificate requests.

use std::path::{Path, PathBuf};

use spp_format::certificate::{
    AuthorityCertificate, IssuerCertificate, SubjectName, UnsignedDocument, authority_certificate, authority_request,
    certificate_pem, root_certificate, root_request, subordinate_certificate,
};
use spp_format::file_format::Faults;
use spp_format::keys::{KeyType, PublicKey, SignatureAlgorithm};
use spp_format::names::KeyName;

use super::backup_file::BackedUpKey;
use super::step::{CeremonyRun, PlannedStep, PreflightContext, Step};
use super::{backup, public_key_of, random_serial};
use crate::hsm::{Ceremony, CreatedKey, KeyManifest, SigningKey, SigningUse};
use crate::officer::files::write_new;
use crate::officer::{OfficerError, now};

pub(super) struct NewSigningKey {
    pub(super) name: KeyName,
    pub(super) key_use: KeyUse,
    pub(super) kind: KeyType,
    pub(super) algorithm: SignatureAlgorithm,
    pub(super) subject: SubjectName,
    pub(super) certificate: CertificateSource,
    pub(super) backup: Option<KeyName>,
}

/// How the use of a new signing key is chosen.
pub(super) enum KeyUse {
    /// The key has this use.
    New(SigningUse),
    /// The key replaces this one and has the same use.
    Replaces(KeyName),
}

/// Source of a signing key's certificate.
pub(super) enum CertificateSource {
    SelfSigned,
    /// An offline root issues it for a certificate request.
    Csr,
    /// A root on this token issues it.
    Issued(KeyName),
}

impl NewSigningKey {
    fn replaces(&self) -> Option<&KeyName> {
        match &self.key_use {
            KeyUse::New(_) => None,
            KeyUse::Replaces(replaced) => Some(replaced),
        }
    }

    /// Use of the key; an error if it cannot replace the older key.
    fn resolve_use(&self, manifest: &KeyManifest) -> Result<SigningUse, String> {
        let replaced = match &self.key_use {
            KeyUse::New(use_) => return Ok(*use_),
            KeyUse::Replaces(replaced) => replaced,
        };
        let key = manifest.signing_key(replaced).ok_or_else(|| format!("keys.toml has no signing key {replaced}"))?;
        if let Some(successor) = manifest.signing.iter().find(|key| key.replaces.as_ref() == Some(replaced)) {
            return Err(format!("{replaced} was already replaced by {}; rotate that key instead", successor.name));
        }
        if key.use_ == SigningUse::Root && matches!(self.certificate, CertificateSource::Issued(_)) {
            return Err("a root must be self-signed or use a csr to an offline root".to_owned());
        }
        Ok(key.use_)
    }

    /// File name of the certificate or request.
    fn file_name(&self) -> PathBuf {
        match self.certificate {
            CertificateSource::SelfSigned | CertificateSource::Issued(_) => certificate_file(&self.name),
            CertificateSource::Csr => PathBuf::from(format!("{}.csr.pem", self.name)),
        }
    }

    /// The certificate or request in PEM; with the issuer's chain if a root on this token issues the certificate.
    fn certify(&self, run: &CeremonyRun<'_>, entry: &SigningKey) -> Result<String, OfficerError> {
        let token = run.token;
        let content = AuthorityCertificate {
            subject: &self.subject,
            public_key: &entry.public_key,
            algorithm: self.algorithm,
            serial: random_serial(token)?,
            not_before: now(),
            not_after: None,
        };
        let is_root = entry.use_ == SigningUse::Root;
        let unsigned = match &self.certificate {
            CertificateSource::Csr if is_root => root_request(&self.subject, &entry.public_key, self.algorithm)?,
            CertificateSource::Csr => authority_request(&self.subject, &entry.public_key, self.algorithm)?,
            CertificateSource::SelfSigned if is_root => root_certificate(&content)?,
            CertificateSource::SelfSigned => authority_certificate(&content)?,
            CertificateSource::Issued(issuer) => return issue(run, issuer, &content),
        };
        sign(token, entry, unsigned)
    }
}

impl Step for NewSigningKey {
    fn created_key(&self) -> Option<&KeyName> {
        Some(&self.name)
    }

    fn creates_issuer(&self) -> bool {
        matches!((&self.key_use, &self.certificate), (KeyUse::New(SigningUse::Root), CertificateSource::SelfSigned))
    }

    fn files(&self) -> Vec<PathBuf> {
        let backup = self.backup.as_ref().map(|_| backup::file_name(&self.name));
        std::iter::once(self.file_name()).chain(backup).collect()
    }

    fn needs_approval(&self, _manifest: Option<&KeyManifest>) -> Option<&'static str> {
        self.replaces().map(|_| "rotates keys")
    }

    fn describe(&self, manifest: Option<&KeyManifest>) -> PlannedStep {
        let use_ = match &self.key_use {
            KeyUse::New(use_) => Some(*use_),
            KeyUse::Replaces(_) => manifest.and_then(|manifest| self.resolve_use(manifest).ok()),
        };
        let what = match use_ {
            Some(SigningUse::Device) => "signs device certificates",
            Some(SigningUse::Access) => "signs TLS certificates",
            Some(SigningUse::Root) => "signs the certificates of other keys of this token",
            None => "same use as the replaced key",
        };
        let replaces = self.replaces().map(|replaced| format!("replaces {replaced}, ")).unwrap_or_default();
        let issuer = match &self.certificate {
            CertificateSource::Issued(issuer) => format!(", certificate issued by {issuer}"),
            CertificateSource::SelfSigned | CertificateSource::Csr => String::new(),
        };
        PlannedStep {
            act: "make",
            name: self.name.clone(),
            kind: self.kind.to_string(),
            what: format!("{replaces}{what}{issuer}{}", backup::describe_backup(self.backup.as_ref())),
            files: self.files(),
            needs_approval: self.needs_approval(manifest).is_some(),
        }
    }

    fn preflight(&self, context: &PreflightContext<'_>, faults: &mut Faults) -> Result<(), OfficerError> {
        backup::check_backup_key(self.backup.as_ref(), context, faults);
        let at = format!("key {}", self.name);
        faults.note(at.as_str(), self.resolve_use(context.manifest));
        if let CertificateSource::Issued(issuer) = &self.certificate
            && !context.creates_issuer(issuer)
        {
            faults.note(at, load_root(context.manifest, issuer));
        }
        Ok(())
    }

    fn execute(&self, run: &mut CeremonyRun<'_>) -> Result<(), OfficerError> {
        let use_ = self.resolve_use(&run.manifest).map_err(OfficerError::Other)?;
        let backup_key = backup::load_backup_key(&run.manifest, self.backup.as_ref())?;
        let key: CreatedKey = backup::create_pair(run.token, &self.name, self.kind, backup_key.as_ref())?;
        let public_key = public_key_of(&key)?;
        let certificate = run.out.join(certificate_file(&self.name));
        let (name, id, provenance) = (key.name.clone(), key.id.clone(), key.provenance);
        let replaces = self.replaces().cloned();
        let entry = SigningKey { name, id, use_, public_key, certificate, replaces, provenance };
        run.finish(&key, |run| {
            let path = run.out.join(self.file_name());
            let pem = self.certify(run, &entry)?;
            write_new(&path, pem.as_bytes())?;
            let report = run.report.add("made", &key, entry.public_key.fingerprint_text());
            report.details.extend(entry.replaces.as_ref().map(|replaced| format!("replaces {replaced}")));
            if let CertificateSource::Issued(issuer) = &self.certificate {
                report.details.push(format!("its certificate is issued by {issuer}"));
            }
            run.report.files.push(path);
            let pem = (!matches!(self.certificate, CertificateSource::Csr)).then_some(pem);
            backup::write_backup(run, &key, backup_key.as_ref(), BackedUpKey::signing(&entry, pem))?;
            run.manifest.signing.push(entry);
            Ok(())
        })
    }
}

/// File name of the certificate, which for a csr is imported later.
pub(super) fn certificate_file(name: &KeyName) -> PathBuf {
    PathBuf::from(format!("{name}-ca.pem"))
}

fn sign(token: &Ceremony, signer: &SigningKey, unsigned: UnsignedDocument) -> Result<String, OfficerError> {
    let signature = token.sign_document(signer, &unsigned)?;
    Ok(unsigned.assemble(&signature)?.to_pem()?)
}

/// Issues the certificate and appends the chain of the root.
fn issue(run: &CeremonyRun<'_>, issuer: &KeyName, content: &AuthorityCertificate<'_>) -> Result<String, OfficerError> {
    let (root, certificate) = load_root(&run.manifest, issuer).map_err(OfficerError::Other)?;
    let mut pem = sign(run.token, root, subordinate_certificate(content, &certificate)?)?;
    for der in certificate.chain() {
        pem.push_str(&certificate_pem(der)?);
    }
    // Parse it as the daemon does.
    IssuerCertificate::from_pem(&pem, content.algorithm)?;
    Ok(pem)
}

/// A root of the manifest with its certificate; an error if it cannot issue.
fn load_root<'a>(manifest: &'a KeyManifest, name: &KeyName) -> Result<(&'a SigningKey, IssuerCertificate), String> {
    let root = manifest.signing_key(name).filter(|key| key.use_ == SigningUse::Root);
    let root = root.ok_or_else(|| format!("keys.toml has no signing key {name} with use = \"root\""))?;
    let certificate = read_certificate(&root.certificate, &root.public_key)?;
    Ok((root, certificate))
}

fn read_certificate(path: &Path, key: &PublicKey) -> Result<IssuerCertificate, String> {
    let hint = "import the certificate of the offline root first";
    let pem = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}; {hint}", path.display()))?;
    let certificate = IssuerCertificate::from_root_pem(&pem);
    let certificate = certificate.map_err(|e| format!("{}: {e}", path.display()))?;
    if certificate.public_key() != key {
        return Err(format!("{} belongs to another key", path.display()));
    }
    Ok(certificate)
}
