//! Reads the metrics page over plain HTTP.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use crate::site::Site;

/// Creates a site whose daemon serves metrics on this address.
pub fn site_with_metrics(address: &str) -> Site {
    let site = Site::new();
    site.edit("sppd.toml", "# metrics = \"127.0.0.1:7446\"", &format!("metrics = \"{address}\""));
    site
}

/// A connection to the metrics listener.
pub fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// Sends a request and returns the whole response.
pub fn ask(port: u16, request: &str) -> String {
    let mut stream = connect(port);
    write!(stream, "{request} HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}
