//! Certificates by which stations, officers and servers know each other over TLS.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use der::asn1::{Ia5String, ObjectIdentifier};
use der::{Decode, Encode as _};
use serde::{Deserialize, Serialize};
use x509_cert::Certificate;
use x509_cert::ext::pkix::name::GeneralName;
use x509_cert::ext::pkix::{ExtendedKeyUsage, KeyUsage, KeyUsages, SubjectAltName};

use super::authority::{UnsignedDocument, key_identifiers, ordered};
use super::name::SubjectName;
use super::prepare::CertificateSerial;
use super::tbs::{self, TbsFields};
use super::{CertificateError, IssuerCertificate, signed};
use crate::keys::PublicKey;
use crate::names::{AuditorName, BackOfficeName, MonitorName, NameError, OfficerName, StationName};

/// `id-kp-serverAuth`, RFC 5280 §4.2.1.12.
const SERVER_AUTH: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.1");
/// `id-kp-clientAuth`, RFC 5280 §4.2.1.12.
const CLIENT_AUTH: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.2");
/// What every caller's URI starts with.
const SCHEME: &str = "spp://";

/// For whom an access certificate is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessName {
    /// Whoever calls: URI `spp://station/line-3/a` for example, clientAuth.
    Client(Caller),
    /// A server: DNS names and IP addresses, serverAuth.
    Server {
        /// DNS names, `spp.example` say.
        dns: Vec<String>,
        /// Addresses.
        ips: Vec<IpAddr>,
    },
}

/// An access certificate to be made.
#[derive(Debug)]
pub struct AccessCertificate<'a> {
    /// For whom.
    pub name: &'a AccessName,
    /// Whose key.
    pub public_key: &'a PublicKey,
    /// The authority for access certificates.
    pub issuer: &'a IssuerCertificate,
    /// The certificate's number.
    pub serial: CertificateSerial,
    /// Seconds since the Unix epoch.
    pub not_before: u64,
    /// Seconds since the Unix epoch. Access always ends.
    pub not_after: u64,
}

/// Puts an access certificate together: digitalSignature, one extended key usage, finite validity.
pub fn access_certificate(wanted: &AccessCertificate<'_>) -> Result<UnsignedDocument, CertificateError> {
    let not_after = ordered(wanted.not_before, wanted.not_after)?;
    if not_after == tbs::NO_EXPIRY {
        return Err(CertificateError::Request("an access certificate must expire; give a validity".into()));
    }
    let (common_name, names, usage) = match wanted.name {
        AccessName::Client(caller) => {
            let uri = format!("{SCHEME}{}/{}", caller.role(), caller.name());
            (caller.name(), vec![tbs::uri(&uri)?], CLIENT_AUTH)
        }
        AccessName::Server { dns, ips } => ("spp server", server_names(dns, ips)?, SERVER_AUTH),
    };
    let subject = SubjectName::with_common_name(common_name).map_err(|e| CertificateError::Request(e.to_string()))?;
    let mut extensions = vec![
        tbs::extension(true, &KeyUsage(KeyUsages::DigitalSignature.into()))?,
        tbs::extension(false, &ExtendedKeyUsage(vec![usage]))?,
        tbs::extension(false, &SubjectAltName(names))?,
    ];
    extensions.extend(key_identifiers(wanted.public_key, wanted.issuer.key_identifier())?);
    let algorithm = wanted.issuer.algorithm();
    let to_be_signed = tbs::encode(TbsFields {
        serial: wanted.serial,
        algorithm,
        issuer: wanted.issuer.subject().clone(),
        not_before: wanted.not_before,
        not_after,
        subject: subject.to_name(None)?,
        public_key: wanted.public_key,
        extensions,
    })?;
    Ok(UnsignedDocument::new("CERTIFICATE", to_be_signed, algorithm, wanted.issuer.public_key()))
}

fn server_names(dns: &[String], ips: &[IpAddr]) -> Result<Vec<GeneralName>, CertificateError> {
    if dns.is_empty() && ips.is_empty() {
        return Err(CertificateError::Request("a server certificate needs a DNS name or an IP address".into()));
    }
    let mut names = Vec::new();
    for name in dns {
        let label_ok = |label: &str| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        };
        if name.len() > 253 || !name.split('.').all(label_ok) {
            return Err(CertificateError::Request(format!("{name:?} is not a DNS name (RFC 1034 §3.5)")));
        }
        let name = Ia5String::new(name).map_err(CertificateError::unwritable("DNS name"))?;
        names.push(GeneralName::DnsName(name));
    }
    names.extend(ips.iter().copied().map(GeneralName::from));
    Ok(names)
}

/// What a caller is. The table of the RPCs says what each may call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Provisions devices on the line.
    Station,
    /// Manages keys, stations and the daemon.
    Officer,
    /// Reads everything and changes nothing.
    Auditor,
    /// The maker's systems that talk to devices later.
    BackOffice,
    /// Sees whether everything is well.
    Monitor,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Station, Self::Officer, Self::Auditor, Self::BackOffice, Self::Monitor];

    /// As it is written in certificates.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Station => "station",
            Self::Officer => "officer",
            Self::Auditor => "auditor",
            Self::BackOffice => "back-office",
            Self::Monitor => "monitor",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let known = Self::ALL.into_iter().find(|known| known.as_str() == text);
        let roles = Self::ALL.map(Self::as_str).join(", ");
        known.ok_or_else(|| NameError::new(format!("there is no role {text}; there are: {roles}")))
    }
}

/// Who a client certificate is of.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Caller {
    /// A station.
    Station(StationName),
    /// An officer.
    Officer(OfficerName),
    /// An auditor.
    Auditor(AuditorName),
    /// A system of the back office.
    BackOffice(BackOfficeName),
    /// A monitor.
    Monitor(MonitorName),
}

impl Caller {
    /// What it is.
    pub const fn role(&self) -> Role {
        match self {
            Self::Station(_) => Role::Station,
            Self::Officer(_) => Role::Officer,
            Self::Auditor(_) => Role::Auditor,
            Self::BackOffice(_) => Role::BackOffice,
            Self::Monitor(_) => Role::Monitor,
        }
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        match self {
            Self::Station(name) => name.as_str(),
            Self::Officer(name) => name.as_str(),
            Self::Auditor(name) => name.as_str(),
            Self::BackOffice(name) => name.as_str(),
            Self::Monitor(name) => name.as_str(),
        }
    }

    /// A caller of that role.
    pub fn new(role: Role, name: &str) -> Result<Self, NameError> {
        match role {
            Role::Station => name.parse().map(Self::Station),
            Role::Officer => name.parse().map(Self::Officer),
            Role::Auditor => name.parse().map(Self::Auditor),
            Role::BackOffice => name.parse().map(Self::BackOffice),
            Role::Monitor => name.parse().map(Self::Monitor),
        }
    }
}

/// `station line-3/a`, as logs and messages name it.
impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.role(), self.name())
    }
}

/// What a client certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallerCertificate {
    /// Who.
    pub caller: Caller,
    /// From when on; seconds since the Unix epoch.
    pub not_before: u64,
    /// Until when; seconds since the Unix epoch.
    pub not_after: u64,
}

/// Reads who a client certificate is of. The certificate has been verified by TLS before; exactly one `spp://` URI must name the
/// caller.
pub fn caller_of(der: &[u8]) -> Result<CallerCertificate, CertificateError> {
    let unreadable = || CertificateError::unreadable("client certificate");
    let certificate = Certificate::from_der(der).map_err(unreadable())?;
    let tbs = certificate.tbs_certificate();
    let names = tbs.get_extension::<SubjectAltName>().map_err(unreadable())?;
    let names = names.map(|(_, names)| names.0).unwrap_or_default();
    let mut callers = names.iter().filter_map(|name| match name {
        GeneralName::UniformResourceIdentifier(uri) => uri.as_str().strip_prefix(SCHEME),
        _ => None,
    });
    let (Some(caller), None) = (callers.next(), callers.next()) else {
        return Err(CertificateError::refused("it has not exactly one spp:// name; use one made by sppctl"));
    };
    let not_before = tbs.validity().not_before.to_unix_duration().as_secs();
    let not_after = tbs.validity().not_after.to_unix_duration().as_secs();
    Ok(CallerCertificate { caller: parse_caller(caller)?, not_before, not_after })
}

/// The same for a certificate that TLS has not verified: one of these authorities for access certificates must have issued it, for a
/// client. Whether it is in time is for whoever knows the time that matters.
pub fn verify_caller(der: &[u8], authorities: &[PublicKey]) -> Result<CallerCertificate, CertificateError> {
    let shell = signed::split("client certificate", der)?;
    if !authorities.iter().any(|authority| shell.verify(authority).is_ok()) {
        return Err(CertificateError::refused("none of the authorities for access certificates has issued it"));
    }
    // What the authority has signed may be a certificate of another kind: of a server, or of an authority under it.
    let usage = shell.certificate()?.get_extension::<ExtendedKeyUsage>();
    let usage = usage.map_err(CertificateError::unreadable("client certificate"))?;
    if usage.is_none_or(|(_, usage)| usage.0 != [CLIENT_AUTH]) {
        return Err(CertificateError::refused(
            "it is not for a client (extendedKeyUsage clientAuth, RFC 5280 §4.2.1.12)",
        ));
    }
    caller_of(der)
}

/// The public key of a certificate.
pub fn public_key_of(der: &[u8]) -> Result<PublicKey, CertificateError> {
    let unreadable = || CertificateError::unreadable("certificate");
    let certificate = Certificate::from_der(der).map_err(unreadable())?;
    let spki = certificate.tbs_certificate().subject_public_key_info().to_der().map_err(unreadable())?;
    PublicKey::from_spki_der(&spki).map_err(|e| CertificateError::refused(e.to_string()))
}

fn parse_caller(path: &str) -> Result<Caller, CertificateError> {
    let refused = |e: NameError| CertificateError::refused(format!("spp://{path}: {e}"));
    let (role, name) = path.split_once('/').unwrap_or((path, ""));
    role.parse().and_then(|role| Caller::new(role, name)).map_err(refused)
}

#[cfg(test)]
mod tests;
