//! Orders: which chip receives which identity and profile, read from a list or generated for simulated devices.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use spp_format::names::{ChipId, DeviceIdentity, Imei, ProfileName};

use super::LineError;

/// One device's order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Order {
    pub(super) chip: ChipId,
    pub(super) identity: DeviceIdentity,
    pub(super) profile: ProfileName,
}

const COLUMNS: [&str; 3] = ["chip_id", "identity", "profile"];
const FILE: &str = "orders.csv";

/// The list of orders in the directory of the simulated devices.
pub(super) fn list_path(devices: &Path) -> PathBuf {
    devices.join(FILE)
}

/// Reads a list. All faults are reported with their lines.
pub(super) fn read(path: &Path) -> Result<Vec<Order>, LineError> {
    let file = std::fs::File::open(path).map_err(LineError::file("opening the orders in", path))?;
    parse(std::io::BufReader::new(file)).map_err(|faults| LineError::Orders { path: path.to_owned(), faults })
}

/// Returns the first `count` orders for the profile from the directory's list. Missing orders are generated and appended to the
/// list, which is synced before this returns, so that no chip known to the daemon is lost here.
pub(super) fn simulate(
    devices: &Path,
    count: usize,
    profile: &ProfileName,
    numbering: &Numbering,
) -> Result<Vec<Order>, LineError> {
    let path = list_path(devices);
    let mut orders = if path.exists() { read(&path)? } else { Vec::new() };
    let matches = |order: &&Order| order.profile == *profile && numbering.contains(&order.identity);
    let missing = count.saturating_sub(orders.iter().filter(matches).count());
    if missing > 0 {
        let added = generate_orders(&orders, missing, profile, numbering)?;
        orders.extend(added);
        write(&path, &orders)?;
    }
    Ok(orders.iter().filter(matches).take(count).cloned().collect())
}

/// The numbering of simulated identities, for example `imei:49015420` followed by six digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Numbering {
    kind: NumberedKind,
    prefix: String,
    digits: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NumberedKind {
    Imei,
    Meid,
    Eui48,
    Eui64,
    Serial,
}

impl NumberedKind {
    const ALL: [Self; 5] = [Self::Imei, Self::Meid, Self::Eui48, Self::Eui64, Self::Serial];

    const fn name(self) -> &'static str {
        match self {
            Self::Imei => "imei",
            Self::Meid => "meid",
            Self::Eui48 => "eui48",
            Self::Eui64 => "eui64",
            Self::Serial => "serial",
        }
    }

    /// The default prefix: the TAC of this system's examples, and locally administered EUIs.
    const fn default_prefix(self) -> &'static str {
        match self {
            Self::Imei => "49015420",
            Self::Meid => "a0000000",
            Self::Eui48 => "020000",
            Self::Eui64 => "0200000000",
            Self::Serial => "SIM-",
        }
    }

    /// Length of an identity without its check digit; a serial gets eight digits after the prefix.
    const fn length(self, prefix: usize) -> usize {
        match self {
            Self::Imei | Self::Meid => 14,
            Self::Eui48 => 12,
            Self::Eui64 => 16,
            Self::Serial => prefix + 8,
        }
    }

    const fn radix(self) -> u64 {
        match self {
            Self::Imei | Self::Serial => 10,
            Self::Meid | Self::Eui48 | Self::Eui64 => 16,
        }
    }
}

impl FromStr for Numbering {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, prefix) = text.split_once(':').unwrap_or((text, ""));
        let kind = NumberedKind::ALL.into_iter().find(|kind| kind.name() == name);
        let kind = kind.ok_or("expected KIND or KIND:START, where KIND is imei, meid, eui48, eui64 or serial")?;
        let prefix = if prefix.is_empty() { kind.default_prefix() } else { prefix };
        // Twelve digits exceed the output of any line and cannot overflow the arithmetic.
        let digits = kind.length(prefix.len()).checked_sub(prefix.len()).filter(|digits| (1..=12).contains(digits));
        let digits = digits.ok_or_else(|| format!("{name}:{prefix} must leave 1 to 12 digits for numbering"))?;
        let digits = u32::try_from(digits).map_err(|e| e.to_string())?;
        let prefix = if kind.radix() == 16 { prefix.to_ascii_lowercase() } else { prefix.to_owned() };
        let numbering = Self { kind, prefix, digits };
        numbering.identity(0).map_err(|e| format!("invalid identity prefix {text}: {e}"))?;
        Ok(numbering)
    }
}

impl Numbering {
    /// The number of identities with this prefix.
    const fn capacity(&self) -> u64 {
        self.kind.radix().pow(self.digits)
    }

    fn identity(&self, number: u64) -> Result<DeviceIdentity, spp_format::names::NameError> {
        let (prefix, width) = (&self.prefix, self.digits as usize);
        let value = match self.kind.radix() {
            16 => format!("{prefix}{number:0width$x}"),
            _ => format!("{prefix}{number:0width$}"),
        };
        let check = match self.kind {
            NumberedKind::Imei => Imei::check_digit(&value).map(|digit| digit.to_string()).unwrap_or_default(),
            _ => String::new(),
        };
        format!("{}:{value}{check}", self.kind.name()).parse()
    }

    /// The sequence number in an identity of this numbering.
    fn number(&self, identity: &DeviceIdentity) -> Option<u64> {
        let value = (identity.kind() == self.kind.name()).then(|| identity.value())?;
        let digits = value.strip_prefix(&self.prefix)?.get(..self.digits as usize)?;
        let number = u64::from_str_radix(digits, u32::try_from(self.kind.radix()).ok()?).ok()?;
        (self.identity(number).as_ref() == Ok(identity)).then_some(number)
    }

    fn contains(&self, identity: &DeviceIdentity) -> bool {
        self.number(identity).is_some()
    }
}

/// Generates chips with the identities after the last one. The first number of a directory is random, so that two directories
/// rarely generate the same identity for one daemon.
fn generate_orders(
    known: &[Order],
    count: usize,
    profile: &ProfileName,
    numbering: &Numbering,
) -> Result<Vec<Order>, LineError> {
    let mut taken: HashSet<u64> = known.iter().filter_map(|order| numbering.number(&order.identity)).collect();
    let capacity = numbering.capacity();
    if count as u64 > capacity - taken.len() as u64 {
        return Err(LineError::Usage(format!(
            "{}:{} has {capacity} identities, {} are in use in this directory, {count} more are needed; \
             choose a shorter or another --identity-prefix",
            numbering.kind.name(),
            numbering.prefix,
            taken.len()
        )));
    }
    let last = known.iter().rev().find_map(|order| numbering.number(&order.identity));
    let mut number = match last {
        Some(last) => (last + 1) % capacity,
        None => u64::from_be_bytes(random()?) % capacity,
    };
    let mut orders = Vec::with_capacity(count);
    while orders.len() < count {
        if taken.insert(number) {
            let invalid = |e: spp_format::names::NameError| LineError::Usage(e.to_string());
            let identity = numbering.identity(number).map_err(invalid)?;
            let chip = ChipId::from_bytes(&random::<16>()?).map_err(invalid)?;
            orders.push(Order { chip, identity, profile: profile.clone() });
        }
        number = (number + 1) % capacity;
    }
    Ok(orders)
}

fn random<const N: usize>() -> Result<[u8; N], LineError> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| LineError::Usage("the random number generator failed".into()))?;
    Ok(bytes)
}

/// Replaces the list atomically. A crash leaves the old or the new list complete.
fn write(path: &Path, orders: &[Order]) -> Result<(), LineError> {
    let staging = path.with_extension("csv.new");
    let write = || {
        let mut text = COLUMNS.join(",");
        for Order { chip, identity, profile } in orders {
            text.push_str(&format!("\n{chip},{},{profile}", quoted(&identity.to_string())));
        }
        text.push('\n');
        let mut file = std::fs::File::create(&staging)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&staging, path)?;
        std::fs::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    write().map_err(LineError::file("writing the orders to", path))
}

/// Quotes a serial that contains a comma (RFC 4180 §2.6); no identity contains a quote.
fn quoted(text: &str) -> String {
    if text.contains(',') { format!("\"{text}\"") } else { text.to_owned() }
}

/// Parses all orders, or returns every fault with its line.
fn parse(source: impl Read) -> Result<Vec<Order>, Vec<String>> {
    let mut reader = csv::ReaderBuilder::new().flexible(true).trim(csv::Trim::All).from_reader(source);
    let columns = columns(reader.headers().map_err(|e| vec![e.to_string()])?)?;
    let mut list = OrderParser::default();
    for record in reader.records() {
        match record {
            Ok(record) => list.add(&record, columns),
            Err(e) => list.faults.push(e.to_string()),
        }
    }
    if list.orders.is_empty() && list.faults.is_empty() {
        list.faults.push("contains no order".to_owned());
    }
    if list.faults.is_empty() { Ok(list.orders) } else { Err(list.faults) }
}

/// The indices of the three columns.
fn columns(header: &csv::StringRecord) -> Result<[usize; 3], Vec<String>> {
    let mut faults: Vec<_> = header
        .iter()
        .filter(|name| !COLUMNS.contains(name))
        .map(|name| format!("line 1: unknown column {name:?}: expected {}", COLUMNS.join(", ")))
        .collect();
    let mut indices = [0; 3];
    for (index, name) in indices.iter_mut().zip(COLUMNS) {
        let mut positions = header.iter().enumerate().filter(|(_, column)| *column == name);
        match (positions.next(), positions.next()) {
            (Some((column, _)), None) => *index = column,
            (None, _) => faults.push(format!("line 1: missing column {name}")),
            _ => faults.push(format!("line 1: duplicate column {name}")),
        }
    }
    if faults.is_empty() { Ok(indices) } else { Err(faults) }
}

#[derive(Default)]
struct OrderParser {
    orders: Vec<Order>,
    faults: Vec<String>,
    chips: HashMap<ChipId, u64>,
    identities: HashMap<DeviceIdentity, u64>,
}

impl OrderParser {
    fn add(&mut self, record: &csv::StringRecord, columns: [usize; 3]) {
        let line = record.position().map_or(0, csv::Position::line);
        if record.len() != columns.len() {
            self.faults.push(format!("line {line}: {} fields, expected {}", record.len(), columns.len()));
            return;
        }
        let [chip, identity, profile] = columns.map(|column| record.get(column).unwrap_or_default());
        let chip = self.parse_field::<ChipId>(line, COLUMNS[0], chip);
        let identity = self.parse_field::<DeviceIdentity>(line, COLUMNS[1], identity);
        let profile = self.parse_field::<ProfileName>(line, COLUMNS[2], profile);
        if let Some(before) = chip.as_ref().and_then(|chip| self.chips.insert(chip.clone(), line)) {
            self.faults.push(format!("line {line}: duplicate chip, first in line {before}"));
        }
        if let Some(before) = identity.as_ref().and_then(|identity| self.identities.insert(identity.clone(), line)) {
            self.faults.push(format!("line {line}: duplicate identity, first in line {before}"));
        }
        if let (Some(chip), Some(identity), Some(profile)) = (chip, identity, profile) {
            self.orders.push(Order { chip, identity, profile });
        }
    }

    fn parse_field<T: FromStr<Err = spp_format::names::NameError>>(
        &mut self,
        line: u64,
        column: &str,
        text: &str,
    ) -> Option<T> {
        text.parse().map_err(|e| self.faults.push(format!("line {line}, {column} {text:?}: {e}"))).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn profile() -> ProfileName {
        "phone".parse().unwrap()
    }

    fn imeis() -> Numbering {
        "imei:49015420".parse().unwrap()
    }

    fn faults(text: &str) -> Vec<String> {
        parse(text.as_bytes()).unwrap_err()
    }

    #[test]
    fn repeated_simulation_returns_same_orders() {
        let directory = spp_test_support::files::temp_dir();
        let first = simulate(directory.path(), 20, &profile(), &imeis()).unwrap();
        assert_eq!(simulate(directory.path(), 20, &profile(), &imeis()).unwrap(), first);
        assert_eq!(simulate(directory.path(), 5, &profile(), &imeis()).unwrap(), first[..5]);
        let more = simulate(directory.path(), 30, &profile(), &imeis()).unwrap();
        assert_eq!(more[..20], first[..]);
        assert_eq!(more.len(), 30);
        assert_eq!(read(&list_path(directory.path())).unwrap(), more);
    }

    #[test]
    fn profiles_in_one_directory_share_no_identity() {
        let directory = spp_test_support::files::temp_dir();
        let tablet: ProfileName = "tablet".parse().unwrap();
        simulate(directory.path(), 3, &profile(), &imeis()).unwrap();
        assert_eq!(simulate(directory.path(), 4, &tablet, &imeis()).unwrap().len(), 4);
        assert_eq!(simulate(directory.path(), 2, &profile(), &"serial".parse().unwrap()).unwrap().len(), 2);
        // Reading rejects duplicate chips and identities.
        assert_eq!(read(&list_path(directory.path())).unwrap().len(), 9);
    }

    #[test]
    fn exhausted_numbering_rejected() {
        let directory = spp_test_support::files::temp_dir();
        let ten: Numbering = "imei:4901542012345".parse().unwrap();
        assert_eq!(simulate(directory.path(), 10, &profile(), &ten).unwrap().len(), 10);
        let error = simulate(directory.path(), 11, &profile(), &ten).unwrap_err();
        assert!(error.to_string().contains("10 identities, 10 are in use"), "{error}");
        assert_eq!(read(&list_path(directory.path())).unwrap().len(), 10, "the list is unchanged");
    }

    #[test]
    fn numbering_of_every_identity_type_is_stable() {
        for kind in ["imei", "meid", "eui48", "eui64", "serial", "serial:A,B-", "eui48:0A", "meid:A0"] {
            let directory = spp_test_support::files::temp_dir();
            let numbering: Numbering = kind.parse().unwrap();
            let orders = simulate(directory.path(), 40, &profile(), &numbering).unwrap();
            assert_eq!(simulate(directory.path(), 40, &profile(), &numbering).unwrap(), orders, "{kind}");
        }
        for wrong in ["", "mac", "imei:490154201234567", "imei:x", "eui48:zz", "meid:10", "eui64:02", "serial:a@"] {
            assert!(wrong.parse::<Numbering>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn list_with_reordered_columns_parsed() {
        let list =
            "identity, profile, chip_id\nserial:SN-1, phone, 0011223344556677\n\"serial:A,B\",phone,0011223344556688\n";
        let orders = parse(list.as_bytes()).unwrap();
        assert_eq!(orders[0].identity.to_string(), "serial:SN-1");
        assert_eq!(orders[1].identity.to_string(), "serial:A,B");
        assert_eq!(orders[0].chip.to_string(), "0011223344556677");
    }

    #[test]
    fn all_faults_of_list_reported_with_lines() {
        let list = "chip_id,identity,profile\n00,imei:1,phone\n0011223344556677,serial:1,PHONE\n\
                    0011223344556677,serial:1,phone\n0011223344556688,serial:2\n";
        let faults = faults(list);
        let starts = [
            "line 2, chip_id \"00\"",
            "line 2, identity \"imei:1\"",
            "line 3, profile \"PHONE\"",
            "line 4: duplicate chip, first in line 3",
            "line 4: duplicate identity, first in line 3",
            "line 5: 2 fields",
        ];
        assert_eq!(faults.len(), starts.len(), "{faults:?}");
        for (fault, start) in faults.iter().zip(starts) {
            assert!(fault.starts_with(start), "{fault} should start with {start}");
        }
    }

    #[test]
    fn list_without_columns_or_orders_rejected() {
        assert_eq!(faults("chip,identity,profile\n").len(), 2);
        assert_eq!(faults("").len(), 3);
        assert_eq!(faults("chip_id,identity,profile,chip_id\n").len(), 1);
        assert!(faults("chip_id,identity,profile\n")[0].contains("no order"));
    }

    proptest! {
        #[test]
        fn parse_of_any_text_returns_orders_or_faults(text in "[ -~\n\"]{0,200}") {
            if let Err(faults) = parse(text.as_bytes()) {
                prop_assert!(!faults.is_empty());
            }
        }

        #[test]
        fn identity_number_round_trips(number in 0u64..1_000_000) {
            let identity = imeis().identity(number).unwrap();
            prop_assert_eq!(imeis().number(&identity), Some(number));
        }
    }
}
