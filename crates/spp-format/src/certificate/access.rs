//! Access certificates: the TLS client and server certificates of stations, officers, other callers and servers.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use der::asn1::{Ia5String, ObjectIdentifier};
use der::{Decode, Encode as _};
use serde::{Deserialize, Serialize};
use x509_cert::Certificate;
use x509_cert::ext::pkix::name::GeneralName;
use x509_cert::ext::pkix::{ExtendedKeyUsage, KeyUsage, KeyUsages, SubjectAltName};

use super::authority::{UnsignedDocument, check_validity_order, key_identifiers};
use super::name::SubjectName;
use super::request::CertificateSerial;
use super::tbs::{self, TbsFields};
use super::{CertificateError, IssuerCertificate, signed};
use crate::keys::PublicKey;
use crate::names::{AuditorName, BackOfficeName, MonitorName, NameError, OfficerName, StationName};

/// `id-kp-serverAuth`, RFC 5280 §4.2.1.12.
const SERVER_AUTH: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.1");
/// `id-kp-clientAuth`, RFC 5280 §4.2.1.12.
const CLIENT_AUTH: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.2");
/// Prefix of every caller's URI.
const SCHEME: &str = "spp://";

/// The subject of an access certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessName {
    /// A caller: URI such as `spp://station/line-3/a`, clientAuth.
    Client(Caller),
    /// A server: DNS names and IP addresses, serverAuth.
    Server {
        /// DNS names such as `spp.example`.
        dns: Vec<String>,
        /// IP addresses.
        ips: Vec<IpAddr>,
    },
}

/// The content of an access certificate to issue.
#[derive(Debug)]
pub struct AccessCertificate<'a> {
    /// The subject.
    pub name: &'a AccessName,
    /// The subject's public key.
    pub public_key: &'a PublicKey,
    /// The access CA.
    pub issuer: &'a IssuerCertificate,
    /// The serial number.
    pub serial: CertificateSerial,
    /// Seconds since the Unix epoch.
    pub not_before: u64,
    /// Seconds since the Unix epoch. An access certificate always expires.
    pub not_after: u64,
}

/// Builds an access certificate: digitalSignature, one extended key usage, finite validity.
pub fn access_certificate(template: &AccessCertificate<'_>) -> Result<UnsignedDocument, CertificateError> {
    let not_after = check_validity_order(template.not_before, template.not_after)?;
    if not_after == tbs::NO_EXPIRY {
        return Err(CertificateError::Request("an access certificate must expire; give a validity in days".into()));
    }
    let (common_name, names, usage) = match template.name {
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
    extensions.extend(key_identifiers(template.public_key, template.issuer.key_identifier())?);
    let algorithm = template.issuer.algorithm();
    let to_be_signed = tbs::encode(TbsFields {
        serial: template.serial,
        algorithm,
        issuer: template.issuer.subject().clone(),
        not_before: template.not_before,
        not_after,
        subject: subject.to_name(None)?,
        public_key: template.public_key,
        extensions,
    })?;
    Ok(UnsignedDocument::new("CERTIFICATE", to_be_signed, algorithm, template.issuer.public_key()))
}

fn server_names(dns: &[String], ips: &[IpAddr]) -> Result<Vec<GeneralName>, CertificateError> {
    if dns.is_empty() && ips.is_empty() {
        return Err(CertificateError::Request("a server certificate requires a DNS name or an IP address".into()));
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
            return Err(CertificateError::Request(format!("invalid DNS name {name:?} (RFC 1034 §3.5)")));
        }
        let name = Ia5String::new(name).map_err(CertificateError::unwritable("DNS name"))?;
        names.push(GeneralName::DnsName(name));
    }
    names.extend(ips.iter().copied().map(GeneralName::from));
    Ok(names)
}

/// The role of a caller. The RPC table defines which calls each role may make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Provisions devices on the line.
    Station,
    /// Manages keys, stations and the daemon.
    Officer,
    /// Read-only access to everything.
    Auditor,
    /// The manufacturer's systems that communicate with devices in the field.
    BackOffice,
    /// Reads health and metrics.
    Monitor,
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 5] = [Self::Station, Self::Officer, Self::Auditor, Self::BackOffice, Self::Monitor];

    /// The name used in certificates.
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
        known.ok_or_else(|| NameError::new(format!("unknown role {text:?}: expected one of {roles}")))
    }
}

/// The authenticated owner of a client certificate.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Caller {
    /// A station.
    Station(StationName),
    /// An officer.
    Officer(OfficerName),
    /// An auditor.
    Auditor(AuditorName),
    /// A back-office system.
    BackOffice(BackOfficeName),
    /// A monitor.
    Monitor(MonitorName),
}

impl Caller {
    /// The caller's role.
    pub const fn role(&self) -> Role {
        match self {
            Self::Station(_) => Role::Station,
            Self::Officer(_) => Role::Officer,
            Self::Auditor(_) => Role::Auditor,
            Self::BackOffice(_) => Role::BackOffice,
            Self::Monitor(_) => Role::Monitor,
        }
    }

    /// The caller's name.
    pub fn name(&self) -> &str {
        match self {
            Self::Station(name) => name.as_str(),
            Self::Officer(name) => name.as_str(),
            Self::Auditor(name) => name.as_str(),
            Self::BackOffice(name) => name.as_str(),
            Self::Monitor(name) => name.as_str(),
        }
    }

    /// Creates a caller of the given role.
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

/// `station line-3/a`, as used in logs and messages.
impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.role(), self.name())
    }
}

/// The contents of a client certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallerCertificate {
    /// The owner.
    pub caller: Caller,
    /// Start of validity, seconds since the Unix epoch.
    pub not_before: u64,
    /// End of validity, seconds since the Unix epoch.
    pub not_after: u64,
}

/// Parses a client certificate whose signature TLS has already verified. Exactly one `spp://` URI must name the caller.
pub fn parse_caller_certificate(der: &[u8]) -> Result<CallerCertificate, CertificateError> {
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
        return Err(CertificateError::refused("expected exactly one spp:// URI; use a certificate issued by sppctl"));
    };
    let not_before = tbs.validity().not_before.to_unix_duration().as_secs();
    let not_after = tbs.validity().not_after.to_unix_duration().as_secs();
    Ok(CallerCertificate { caller: parse_caller(caller)?, not_before, not_after })
}

/// Parses and verifies a client certificate that TLS has not verified: one of the access CAs `authorities` must have issued it
/// for client authentication. The caller checks the validity period, because only the caller knows the relevant time.
pub fn verify_caller_certificate(der: &[u8], authorities: &[PublicKey]) -> Result<CallerCertificate, CertificateError> {
    let envelope = signed::split("client certificate", der)?;
    if !authorities.iter().any(|authority| envelope.verify(authority).is_ok()) {
        return Err(CertificateError::refused("not issued by a known access CA"));
    }
    // The access CA also signs server certificates and its own; only clientAuth certificates identify a caller.
    let usage = envelope.certificate()?.get_extension::<ExtendedKeyUsage>();
    let usage = usage.map_err(CertificateError::unreadable("client certificate"))?;
    if usage.is_none_or(|(_, usage)| usage.0 != [CLIENT_AUTH]) {
        return Err(CertificateError::refused("extendedKeyUsage is not clientAuth (RFC 5280 §4.2.1.12)"));
    }
    parse_caller_certificate(der)
}

/// The public key of a certificate.
pub fn certificate_public_key(der: &[u8]) -> Result<PublicKey, CertificateError> {
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
