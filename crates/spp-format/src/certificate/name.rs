//! Distinguished names, built from attributes rather than from RFC 4514 text, so that a comma in a value cannot become an
//! attribute.

use der::asn1::{ObjectIdentifier, PrintableStringRef, SetOfVec, Utf8StringRef};
use der::{Any, Tag, Tagged as _};
use serde::Deserialize;
use x509_cert::attr::AttributeTypeAndValue;
use x509_cert::name::{Name, RdnSequence, RelativeDistinguishedName};

use super::CertificateError;
use crate::file_format::Faults;

/// `id-at-commonName`, RFC 5280 Appendix A.1.
pub(super) const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");
/// `id-at-serialNumber`, RFC 5280 Appendix A.1.
pub(super) const SERIAL_NUMBER: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.5");
/// `id-at-countryName`, RFC 5280 Appendix A.1.
pub(super) const COUNTRY: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.6");
/// `id-at-organizationName`, RFC 5280 Appendix A.1.
pub(super) const ORGANIZATION: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.10");
/// `id-at-organizationalUnitName`, RFC 5280 Appendix A.1.
pub(super) const ORGANIZATIONAL_UNIT: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.11");
/// `ub-common-name`, `ub-organization-name`, `ub-organizational-unit-name`: 64 characters (RFC 5280 Appendix A.1).
const MAX_TEXT: usize = 64;

/// The attributes of a name in a configuration file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SubjectFields {
    /// ISO 3166 country code, two letters.
    pub country: Option<String>,
    /// 1 to 64 characters.
    pub organization: Option<String>,
    /// 1 to 64 characters.
    pub organizational_unit: Option<String>,
    /// 1 to 64 characters.
    pub common_name: Option<String>,
}

/// The validated constant part of a distinguished name, in the order country, organization, unit, common name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SubjectName(SubjectFields);

impl SubjectName {
    /// Validates the attributes. The place of a fault is `place` followed by the attribute's name.
    pub fn from_fields(place: &str, fields: SubjectFields) -> Result<Self, Faults> {
        let mut faults = Faults::default();
        if let Some(country) = &fields.country
            && !(country.len() == 2 && country.bytes().all(|b| b.is_ascii_uppercase()))
        {
            faults.add(format!("{place}.country"), "write two capital letters of ISO 3166, FI for example");
        }
        for (key, text) in [
            ("organization", &fields.organization),
            ("organizational_unit", &fields.organizational_unit),
            ("common_name", &fields.common_name),
        ] {
            let is_valid = |t: &str| (1..=MAX_TEXT).contains(&t.chars().count()) && !t.chars().any(char::is_control);
            if text.as_deref().is_some_and(|t| !is_valid(t)) {
                faults.add(format!("{place}.{key}"), "expected 1 to 64 characters without control characters");
            }
        }
        faults.into_result(Some(Self(fields)))
    }

    /// Creates a name with a common name only.
    pub fn with_common_name(common_name: &str) -> Result<Self, Faults> {
        let fields = SubjectFields { common_name: Some(common_name.to_owned()), ..SubjectFields::default() };
        Self::from_fields("subject", fields)
    }

    /// The attributes.
    pub const fn fields(&self) -> &SubjectFields {
        &self.0
    }

    /// Encodes the name, with `serial_number` as its last attribute if given.
    pub(super) fn to_name(&self, serial_number: Option<&str>) -> Result<Name, CertificateError> {
        let attributes = [
            (COUNTRY, Tag::PrintableString, self.0.country.as_deref()),
            (ORGANIZATION, Tag::Utf8String, self.0.organization.as_deref()),
            (ORGANIZATIONAL_UNIT, Tag::Utf8String, self.0.organizational_unit.as_deref()),
            (COMMON_NAME, Tag::Utf8String, self.0.common_name.as_deref()),
            (SERIAL_NUMBER, Tag::PrintableString, serial_number),
        ];
        let mut rdns = RdnSequence::default();
        for (oid, tag, value) in attributes {
            if let Some(value) = value {
                rdns.push(rdn(oid, tag, value).map_err(CertificateError::unwritable("subject name"))?);
            }
        }
        Ok(Name::hazmat_from_rdn_sequence(rdns))
    }
}

/// The bytes by which names are compared: equal for names that match by RFC 5280 §7.1, which ignores case and insignificant
/// spaces. Characters are folded one by one, without the compatibility mapping of RFC 4518.
pub(super) fn normalised(name: &Name) -> Vec<u8> {
    let mut out = Vec::new();
    let mut push = |part: &[u8]| {
        out.extend_from_slice(&(part.len() as u64).to_be_bytes());
        out.extend_from_slice(part);
    };
    for attribute in name.iter() {
        push(attribute.oid.as_bytes());
        match attribute.value.tag() {
            Tag::PrintableString | Tag::Utf8String | Tag::Ia5String => {
                push(normalised_text(&String::from_utf8_lossy(attribute.value.value())).as_bytes());
            }
            _ => push(attribute.value.value()),
        }
    }
    out
}

/// Lower case, without spaces at either end, with single spaces inside.
fn normalised_text(text: &str) -> String {
    let words = text.split_whitespace().map(|word| word.chars().flat_map(char::to_lowercase).collect::<String>());
    words.collect::<Vec<_>>().join(" ")
}

fn rdn(oid: ObjectIdentifier, tag: Tag, value: &str) -> der::Result<RelativeDistinguishedName> {
    let value = match tag {
        Tag::PrintableString => Any::encode_from(&PrintableStringRef::new(value)?)?,
        _ => Any::encode_from(&Utf8StringRef::new(value)?)?,
    };
    let mut set = SetOfVec::new();
    set.insert(AttributeTypeAndValue { oid, value })?;
    Ok(RelativeDistinguishedName::from(set))
}

#[cfg(test)]
mod tests {
    use super::*;
    use der::Encode;

    #[test]
    fn attribute_with_comma_stays_one_attribute() {
        let fields = SubjectFields { organization: Some("A, CN=evil".into()), ..SubjectFields::default() };
        let name = SubjectName::from_fields("subject", fields).unwrap().to_name(Some("1")).unwrap();
        assert_eq!(name.len(), 2);
        assert!(name.to_der().unwrap().windows(10).any(|w| w == b"A, CN=evil"));
    }

    #[test]
    fn names_that_differ_in_case_or_spaces_are_equal() {
        let name = |organization: &str, serial: &str| {
            let fields = SubjectFields { organization: Some(organization.to_owned()), ..SubjectFields::default() };
            normalised(&SubjectName::from_fields("subject", fields).unwrap().to_name(Some(serial)).unwrap())
        };
        assert_eq!(name("Acme  Devices", "sn-1"), name(" acme devices", "SN-1 "));
        assert_ne!(name("Acme", "SN-1"), name("Acme", "SN-2"));
        assert_ne!(name("Acme", "SN 1"), name("Acme", "SN1"));
        assert_ne!(name("Acme S", "N"), name("Acme", "S N"), "where an attribute ends counts");
    }

    #[test]
    fn invalid_attributes_all_reported_with_place() {
        let fields = SubjectFields {
            country: Some("fi".into()),
            organization: Some(String::new()),
            common_name: Some("a\nb".into()),
            ..SubjectFields::default()
        };
        let faults = SubjectName::from_fields("p.toml: subject", fields).unwrap_err();
        let places: Vec<_> = faults.iter().map(|f| f.place.as_str()).collect();
        assert_eq!(places, ["p.toml: subject.country", "p.toml: subject.organization", "p.toml: subject.common_name"]);
    }
}
