//! Keys that sign certificates, with their own: new ones, and those that take over the work of older ones.

use std::path::{Path, PathBuf};

use super::backup_file::What;
use super::{Act, Before, Holding, PlannedAct, backup, public_half, random_serial};
use crate::certificate::{
    AuthorityCertificate, IssuerCertificate, SubjectName, UnsignedDocument, authority_certificate, authority_request,
    certificate_pem, root_certificate, root_request, subordinate_certificate,
};
use crate::config::Faults;
use crate::hsm::{Ceremony, CreatedKey, KeyManifest, SigningKey, SigningUse};
use crate::keys::{KeyKind, PublicKey, SignatureAlgorithm};
use crate::names::KeyName;
use crate::officer::files::write_new;
use crate::officer::{OfficerError, now};

pub(super) struct NewSigningKey {
    pub(super) name: KeyName,
    pub(super) work: Work,
    pub(super) kind: KeyKind,
    pub(super) algorithm: SignatureAlgorithm,
    pub(super) subject: SubjectName,
    pub(super) certificate: Route,
    pub(super) backup: Option<KeyName>,
}

/// What a key signs.
pub(super) enum Work {
    /// A work of its own.
    Begins(SigningUse),
    /// What that key has signed until now.
    GoesOn(KeyName),
}

/// How a signing key comes by its certificate.
pub(super) enum Route {
    SelfSigned,
    /// An offline root answers to a request.
    Csr,
    /// A root of this token signs it.
    Issued(KeyName),
}

impl NewSigningKey {
    fn replaces(&self) -> Option<&KeyName> {
        match &self.work {
            Work::Begins(_) => None,
            Work::GoesOn(older) => Some(older),
        }
    }

    /// What it will sign; the reason if it cannot take over that work.
    fn use_in(&self, register: &KeyManifest) -> Result<SigningUse, String> {
        let older = match &self.work {
            Work::Begins(use_) => return Ok(*use_),
            Work::GoesOn(older) => older,
        };
        let key = register.signing_key(older).ok_or_else(|| format!("the register has no signing key {older}"))?;
        if let Some(newer) = register.signing.iter().find(|key| key.replaces.as_ref() == Some(older)) {
            return Err(format!("{older} was replaced by {} already; rotate that one", newer.name));
        }
        if key.use_ == SigningUse::Root && matches!(self.certificate, Route::Issued(_)) {
            return Err("a root is self-signed, or has a csr for another one above it".to_owned());
        }
        Ok(key.use_)
    }

    /// The file that the ceremony writes.
    fn file_name(&self) -> PathBuf {
        match self.certificate {
            Route::SelfSigned | Route::Issued(_) => certificate_file(&self.name),
            Route::Csr => PathBuf::from(format!("{}.csr.pem", self.name)),
        }
    }

    /// What is written for it, in PEM: its certificate, with those above it if a key of this token has issued it, or a request.
    fn certify(&self, holding: &Holding<'_>, entry: &SigningKey) -> Result<String, OfficerError> {
        let token = holding.token;
        let wanted = AuthorityCertificate {
            subject: &self.subject,
            public_key: &entry.public_key,
            algorithm: self.algorithm,
            serial: random_serial(token)?,
            not_before: now(),
            not_after: None,
        };
        let is_root = entry.use_ == SigningUse::Root;
        let unsigned = match &self.certificate {
            Route::Csr if is_root => root_request(&self.subject, &entry.public_key, self.algorithm)?,
            Route::Csr => authority_request(&self.subject, &entry.public_key, self.algorithm)?,
            Route::SelfSigned if is_root => root_certificate(&wanted)?,
            Route::SelfSigned => authority_certificate(&wanted)?,
            Route::Issued(issuer) => return issue(holding, issuer, &wanted),
        };
        sign(token, entry, unsigned)
    }
}

impl Act for NewSigningKey {
    fn gives(&self) -> Option<&KeyName> {
        Some(&self.name)
    }

    fn gives_issuer(&self) -> bool {
        matches!((&self.work, &self.certificate), (Work::Begins(SigningUse::Root), Route::SelfSigned))
    }

    fn files(&self) -> Vec<PathBuf> {
        let backup = self.backup.as_ref().map(|_| backup::file_name(&self.name));
        std::iter::once(self.file_name()).chain(backup).collect()
    }

    fn needs_approval(&self, _register: Option<&KeyManifest>) -> Option<&'static str> {
        self.replaces().map(|_| "rotates keys")
    }

    fn planned(&self, register: Option<&KeyManifest>) -> PlannedAct {
        let use_ = match &self.work {
            Work::Begins(use_) => Some(*use_),
            Work::GoesOn(_) => register.and_then(|register| self.use_in(register).ok()),
        };
        let what = match use_ {
            Some(SigningUse::Device) => "signs device certificates",
            Some(SigningUse::Access) => "signs TLS certificates",
            Some(SigningUse::Root) => "signs the certificates of other keys of this token",
            None => "signs what that one has signed",
        };
        let replaces = self.replaces().map(|older| format!("replaces {older}, ")).unwrap_or_default();
        let issuer = match &self.certificate {
            Route::Issued(issuer) => format!(", its certificate is issued by {issuer}"),
            Route::SelfSigned | Route::Csr => String::new(),
        };
        PlannedAct {
            act: "make",
            name: self.name.clone(),
            kind: self.kind.to_string(),
            what: format!("{replaces}{what}{issuer}{}", backup::words(self.backup.as_ref())),
            files: self.files(),
            needs_approval: self.needs_approval(register).is_some(),
        }
    }

    fn look(&self, before: &Before<'_>, faults: &mut Faults) -> Result<(), OfficerError> {
        backup::look(self.backup.as_ref(), before, faults);
        let at = format!("key {}", self.name);
        faults.note(at.as_str(), self.use_in(before.register));
        if let Route::Issued(issuer) = &self.certificate
            && !before.makes_issuer(issuer)
        {
            faults.note(at, root_in(before.register, issuer));
        }
        Ok(())
    }

    fn hold(&self, holding: &mut Holding<'_>) -> Result<(), OfficerError> {
        let use_ = self.use_in(&holding.register).map_err(OfficerError::Other)?;
        let under = backup::key_of(&holding.register, self.backup.as_ref())?;
        let key: CreatedKey = backup::create_pair(holding.token, &self.name, self.kind, under.as_ref())?;
        let public_key = public_half(&key)?;
        let certificate = holding.out.join(certificate_file(&self.name));
        let (name, id, provenance) = (key.name.clone(), key.id.clone(), key.provenance);
        let replaces = self.replaces().cloned();
        let entry = SigningKey { name, id, use_, public_key, certificate, replaces, provenance };
        holding.finish(&key, |holding| {
            let path = holding.out.join(self.file_name());
            let pem = self.certify(holding, &entry)?;
            write_new(&path, pem.as_bytes())?;
            let report = holding.report.add("made", &key, entry.public_key.known_by());
            report.details.extend(entry.replaces.as_ref().map(|older| format!("replaces {older}")));
            if let Route::Issued(issuer) = &self.certificate {
                report.details.push(format!("its certificate is issued by {issuer}"));
            }
            holding.report.files.push(path);
            let pem = (!matches!(self.certificate, Route::Csr)).then_some(pem);
            backup::keep(holding, &key, under.as_ref(), What::signing(&entry, pem))?;
            holding.register.signing.push(entry);
            Ok(())
        })
    }
}

/// Where the certificate is, or will be once the offline root has answered.
pub(super) fn certificate_file(name: &KeyName) -> PathBuf {
    PathBuf::from(format!("{name}-ca.pem"))
}

fn sign(token: &Ceremony, signer: &SigningKey, unsigned: UnsignedDocument) -> Result<String, OfficerError> {
    let (kind, algorithm) = (signer.public_key.kind(), unsigned.algorithm());
    let signature = token.sign(&signer.name, &signer.id, kind, algorithm, unsigned.to_be_signed())?;
    Ok(unsigned.assemble(&signature)?.to_pem()?)
}

/// The chain of the new certificate: what stands above the root of this token, too.
fn issue(holding: &Holding<'_>, issuer: &KeyName, wanted: &AuthorityCertificate<'_>) -> Result<String, OfficerError> {
    let (root, certificate) = root_in(&holding.register, issuer).map_err(OfficerError::Other)?;
    let mut pem = sign(holding.token, root, subordinate_certificate(wanted, &certificate)?)?;
    for der in certificate.chain() {
        pem.push_str(&certificate_pem(der)?);
    }
    // As the daemon will read it.
    IssuerCertificate::from_pem(&pem, wanted.algorithm)?;
    Ok(pem)
}

/// A root of the register with its certificate; the reason if it cannot issue.
fn root_in<'a>(register: &'a KeyManifest, name: &KeyName) -> Result<(&'a SigningKey, IssuerCertificate), String> {
    let root = register.signing_key(name).filter(|key| key.use_ == SigningUse::Root);
    let root = root.ok_or_else(|| format!("the register has no signing key {name} with use = \"root\""))?;
    let certificate = read_certificate(&root.certificate, &root.public_key)?;
    Ok((root, certificate))
}

fn read_certificate(path: &Path, key: &PublicKey) -> Result<IssuerCertificate, String> {
    let hint = "for a key with a csr, import the offline root's answer first";
    let pem = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}; {hint}", path.display()))?;
    let certificate = IssuerCertificate::from_pem_of_root(&pem);
    let certificate = certificate.map_err(|e| format!("{}: {e}", path.display()))?;
    if certificate.public_key() != key {
        return Err(format!("{} is the certificate of another key", path.display()));
    }
    Ok(certificate)
}
