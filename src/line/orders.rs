//! Which chip gets which identity and profile: read from a list, or made up for simulated devices.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::LineError;
use crate::names::{ChipId, DeviceIdentity, Imei, ProfileName};

/// One device's order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Order {
    pub(super) chip: ChipId,
    pub(super) identity: DeviceIdentity,
    pub(super) profile: ProfileName,
}

const COLUMNS: [&str; 3] = ["chip_id", "identity", "profile"];
const FILE: &str = "orders.csv";

/// The list in the directory of the simulated devices.
pub(super) fn list_in(devices: &Path) -> PathBuf {
    devices.join(FILE)
}

/// Reads a list; every fault is told at once, with its line.
pub(super) fn read(path: &Path) -> Result<Vec<Order>, LineError> {
    let file = std::fs::File::open(path).map_err(LineError::file("opening the orders in", path))?;
    parse(std::io::BufReader::new(file)).map_err(|faults| LineError::Orders { path: path.to_owned(), faults })
}

/// The first `count` orders for the profile in the directory's list. What is missing is made up and added to the list, which is on
/// the disk before this returns: a simulated chip that the daemon may know is never forgotten here.
pub(super) fn simulate(
    devices: &Path,
    count: usize,
    profile: &ProfileName,
    numbering: &Numbering,
) -> Result<Vec<Order>, LineError> {
    let path = list_in(devices);
    let mut orders = if path.exists() { read(&path)? } else { Vec::new() };
    let wanted = |order: &&Order| order.profile == *profile && numbering.gave(&order.identity);
    let missing = count.saturating_sub(orders.iter().filter(wanted).count());
    if missing > 0 {
        let added = make_up(&orders, missing, profile, numbering)?;
        orders.extend(added);
        write(&path, &orders)?;
    }
    Ok(orders.iter().filter(wanted).take(count).cloned().collect())
}

/// How simulated identities are numbered: `imei:49015420` and six running digits, say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Numbering {
    kind: Kind,
    prefix: String,
    digits: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Imei,
    Meid,
    Eui48,
    Eui64,
    Serial,
}

impl Kind {
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

    /// The prefix when only the kind is said: the TAC of this system's examples, and locally administered EUIs.
    const fn usual_prefix(self) -> &'static str {
        match self {
            Self::Imei => "49015420",
            Self::Meid => "a0000000",
            Self::Eui48 => "020000",
            Self::Eui64 => "0200000000",
            Self::Serial => "SIM-",
        }
    }

    /// Characters of an identity but for a check digit; a serial gets eight running digits.
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
        let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name);
        let kind = kind.ok_or("write KIND or KIND:START; the kinds are imei, meid, eui48, eui64 and serial")?;
        let prefix = if prefix.is_empty() { kind.usual_prefix() } else { prefix };
        // Twelve running digits are more than any line makes, and fit the arithmetic.
        let digits = kind.length(prefix.len()).checked_sub(prefix.len()).filter(|digits| (1..=12).contains(digits));
        let digits = digits.ok_or_else(|| format!("{name}:{prefix} does not leave 1 to 12 digits to count with"))?;
        let digits = u32::try_from(digits).map_err(|e| e.to_string())?;
        let prefix = if kind.radix() == 16 { prefix.to_ascii_lowercase() } else { prefix.to_owned() };
        let numbering = Self { kind, prefix, digits };
        numbering.identity(0).map_err(|e| format!("{text} is no start of an identity: {e}"))?;
        Ok(numbering)
    }
}

impl Numbering {
    /// How many identities there are.
    const fn capacity(&self) -> u64 {
        self.kind.radix().pow(self.digits)
    }

    fn identity(&self, number: u64) -> Result<DeviceIdentity, crate::names::NameError> {
        let (prefix, width) = (&self.prefix, self.digits as usize);
        let value = match self.kind.radix() {
            16 => format!("{prefix}{number:0width$x}"),
            _ => format!("{prefix}{number:0width$}"),
        };
        let check = match self.kind {
            Kind::Imei => Imei::check_digit(&value).map(|digit| digit.to_string()).unwrap_or_default(),
            _ => String::new(),
        };
        format!("{}:{value}{check}", self.kind.name()).parse()
    }

    /// The running number in an identity of this numbering.
    fn number(&self, identity: &DeviceIdentity) -> Option<u64> {
        let value = (identity.kind() == self.kind.name()).then(|| identity.value())?;
        let running = value.strip_prefix(&self.prefix)?.get(..self.digits as usize)?;
        let number = u64::from_str_radix(running, u32::try_from(self.kind.radix()).ok()?).ok()?;
        (self.identity(number).as_ref() == Ok(identity)).then_some(number)
    }

    fn gave(&self, identity: &DeviceIdentity) -> bool {
        self.number(identity).is_some()
    }
}

/// New chips with the identities after the last one. The first of a directory starts anywhere, so that two directories seldom
/// make up the same identity for one daemon.
fn make_up(
    known: &[Order],
    count: usize,
    profile: &ProfileName,
    numbering: &Numbering,
) -> Result<Vec<Order>, LineError> {
    let mut taken: HashSet<u64> = known.iter().filter_map(|order| numbering.number(&order.identity)).collect();
    let capacity = numbering.capacity();
    if count as u64 > capacity - taken.len() as u64 {
        return Err(LineError::Usage(format!(
            "{}:{} has {capacity} identities, {} are taken in this directory, {count} more are wanted; choose a shorter or another \
             --identity-prefix",
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
            let unusable = |e: crate::names::NameError| LineError::Usage(e.to_string());
            let identity = numbering.identity(number).map_err(unusable)?;
            let chip = ChipId::from_bytes(&random::<16>()?).map_err(unusable)?;
            orders.push(Order { chip, identity, profile: profile.clone() });
        }
        number = (number + 1) % capacity;
    }
    Ok(orders)
}

fn random<const N: usize>() -> Result<[u8; N], LineError> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| LineError::Usage("the system has no random numbers".into()))?;
    Ok(bytes)
}

/// Replaces the list. A crash leaves the old one or the new one, whole.
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

/// A serial may contain a comma (RFC 4180 §2.6); no identity contains a quote.
fn quoted(text: &str) -> String {
    if text.contains(',') { format!("\"{text}\"") } else { text.to_owned() }
}

/// The orders, or every fault with its line.
fn parse(source: impl Read) -> Result<Vec<Order>, Vec<String>> {
    let mut reader = csv::ReaderBuilder::new().flexible(true).trim(csv::Trim::All).from_reader(source);
    let columns = columns(reader.headers().map_err(|e| vec![e.to_string()])?)?;
    let mut list = List::default();
    for record in reader.records() {
        match record {
            Ok(record) => list.add(&record, columns),
            Err(e) => list.faults.push(e.to_string()),
        }
    }
    if list.orders.is_empty() && list.faults.is_empty() {
        list.faults.push("there is no order in it".to_owned());
    }
    if list.faults.is_empty() { Ok(list.orders) } else { Err(list.faults) }
}

/// Where the three columns are.
fn columns(header: &csv::StringRecord) -> Result<[usize; 3], Vec<String>> {
    let mut faults: Vec<_> = header
        .iter()
        .filter(|name| !COLUMNS.contains(name))
        .map(|name| format!("line 1: there is no column {name:?}; the columns are {}", COLUMNS.join(", ")))
        .collect();
    let mut found = [0; 3];
    for (place, name) in found.iter_mut().zip(COLUMNS) {
        let mut places = header.iter().enumerate().filter(|(_, column)| *column == name);
        match (places.next(), places.next()) {
            (Some((column, _)), None) => *place = column,
            (None, _) => faults.push(format!("line 1: the column {name} is missing")),
            _ => faults.push(format!("line 1: the column {name} is there more than once")),
        }
    }
    if faults.is_empty() { Ok(found) } else { Err(faults) }
}

#[derive(Default)]
struct List {
    orders: Vec<Order>,
    faults: Vec<String>,
    chips: HashMap<ChipId, u64>,
    identities: HashMap<DeviceIdentity, u64>,
}

impl List {
    fn add(&mut self, record: &csv::StringRecord, columns: [usize; 3]) {
        let line = record.position().map_or(0, csv::Position::line);
        if record.len() != columns.len() {
            self.faults.push(format!("line {line}: {} fields, there must be {}", record.len(), columns.len()));
            return;
        }
        let [chip, identity, profile] = columns.map(|column| record.get(column).unwrap_or_default());
        let chip = self.parsed::<ChipId>(line, COLUMNS[0], chip);
        let identity = self.parsed::<DeviceIdentity>(line, COLUMNS[1], identity);
        let profile = self.parsed::<ProfileName>(line, COLUMNS[2], profile);
        if let Some(before) = chip.as_ref().and_then(|chip| self.chips.insert(chip.clone(), line)) {
            self.faults.push(format!("line {line}: the chip is in line {before} already"));
        }
        if let Some(before) = identity.as_ref().and_then(|identity| self.identities.insert(identity.clone(), line)) {
            self.faults.push(format!("line {line}: the identity is in line {before} already"));
        }
        if let (Some(chip), Some(identity), Some(profile)) = (chip, identity, profile) {
            self.orders.push(Order { chip, identity, profile });
        }
    }

    fn parsed<T: FromStr<Err = crate::names::NameError>>(&mut self, line: u64, column: &str, text: &str) -> Option<T> {
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
    fn the_same_simulation_again_has_the_same_orders() {
        let directory = spp_testkit::files::temp_dir();
        let first = simulate(directory.path(), 20, &profile(), &imeis()).unwrap();
        assert_eq!(simulate(directory.path(), 20, &profile(), &imeis()).unwrap(), first);
        assert_eq!(simulate(directory.path(), 5, &profile(), &imeis()).unwrap(), first[..5]);
        let more = simulate(directory.path(), 30, &profile(), &imeis()).unwrap();
        assert_eq!(more[..20], first[..]);
        assert_eq!(more.len(), 30);
        assert_eq!(read(&list_in(directory.path())).unwrap(), more);
    }

    #[test]
    fn products_share_a_directory_and_no_identity() {
        let directory = spp_testkit::files::temp_dir();
        let tablet: ProfileName = "tablet".parse().unwrap();
        simulate(directory.path(), 3, &profile(), &imeis()).unwrap();
        assert_eq!(simulate(directory.path(), 4, &tablet, &imeis()).unwrap().len(), 4);
        assert_eq!(simulate(directory.path(), 2, &profile(), &"serial".parse().unwrap()).unwrap().len(), 2);
        // Reading it back refuses a chip or an identity that is there twice.
        assert_eq!(read(&list_in(directory.path())).unwrap().len(), 9);
    }

    #[test]
    fn a_numbering_that_is_used_up_says_so() {
        let directory = spp_testkit::files::temp_dir();
        let ten: Numbering = "imei:4901542012345".parse().unwrap();
        assert_eq!(simulate(directory.path(), 10, &profile(), &ten).unwrap().len(), 10);
        let refused = simulate(directory.path(), 11, &profile(), &ten).unwrap_err();
        assert!(refused.to_string().contains("10 identities, 10 are taken"), "{refused}");
        assert_eq!(read(&list_in(directory.path())).unwrap().len(), 10, "a refusal leaves the list as it was");
    }

    #[test]
    fn every_kind_can_be_numbered() {
        for kind in ["imei", "meid", "eui48", "eui64", "serial", "serial:A,B-", "eui48:0A", "meid:A0"] {
            let directory = spp_testkit::files::temp_dir();
            let numbering: Numbering = kind.parse().unwrap();
            let orders = simulate(directory.path(), 40, &profile(), &numbering).unwrap();
            assert_eq!(simulate(directory.path(), 40, &profile(), &numbering).unwrap(), orders, "{kind}");
        }
        for wrong in ["", "mac", "imei:490154201234567", "imei:x", "eui48:zz", "meid:10", "eui64:02", "serial:a@"] {
            assert!(wrong.parse::<Numbering>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_list_is_read_whatever_the_order_of_its_columns() {
        let list =
            "identity, profile, chip_id\nserial:SN-1, phone, 0011223344556677\n\"serial:A,B\",phone,0011223344556688\n";
        let orders = parse(list.as_bytes()).unwrap();
        assert_eq!(orders[0].identity.to_string(), "serial:SN-1");
        assert_eq!(orders[1].identity.to_string(), "serial:A,B");
        assert_eq!(orders[0].chip.to_string(), "0011223344556677");
    }

    #[test]
    fn all_faults_of_a_list_are_told_with_their_lines() {
        let list = "chip_id,identity,profile\n00,imei:1,phone\n0011223344556677,serial:1,PHONE\n\
                    0011223344556677,serial:1,phone\n0011223344556688,serial:2\n";
        let faults = faults(list);
        let starts = [
            "line 2, chip_id \"00\"",
            "line 2, identity \"imei:1\"",
            "line 3, profile \"PHONE\"",
            "line 4: the chip is in line 3",
            "line 4: the identity is in line 3",
            "line 5: 2 fields",
        ];
        assert_eq!(faults.len(), starts.len(), "{faults:?}");
        for (fault, start) in faults.iter().zip(starts) {
            assert!(fault.starts_with(start), "{fault} should start with {start}");
        }
    }

    #[test]
    fn a_list_without_its_columns_or_orders_is_refused() {
        assert_eq!(faults("chip,identity,profile\n").len(), 2);
        assert_eq!(faults("").len(), 3);
        assert_eq!(faults("chip_id,identity,profile,chip_id\n").len(), 1);
        assert!(faults("chip_id,identity,profile\n")[0].contains("no order"));
    }

    proptest! {
        #[test]
        fn any_text_is_orders_or_faults(text in "[ -~\n\"]{0,200}") {
            if let Err(faults) = parse(text.as_bytes()) {
                prop_assert!(!faults.is_empty());
            }
        }

        #[test]
        fn an_identity_tells_its_number(number in 0u64..1_000_000) {
            let identity = imeis().identity(number).unwrap();
            prop_assert_eq!(imeis().number(&identity), Some(number));
        }
    }
}
