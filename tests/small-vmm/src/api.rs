//! A client of the management API: HTTP/1.1 over a Unix socket, small enough to send wrong requests
//! too.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

const TIMEOUT: Duration = Duration::from_secs(10);

/// A response.
#[derive(Clone, Debug)]
pub struct ApiResponse {
    /// The status code.
    pub status: u16,
    /// Names in lower case, and values.
    pub headers: Vec<(String, String)>,
    /// The body as it came.
    pub text: String,
}

impl ApiResponse {
    /// The body as JSON; null when it is something else.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or(Value::Null)
    }

    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// Whether the status is one of success.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }
}

/// Where the API is.
#[derive(Clone, Debug)]
pub struct ApiClient {
    path: PathBuf,
}

impl ApiClient {
    /// A client of the API at this socket; each request makes a connection of its own.
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self { path: path.as_ref().to_owned() }
    }

    /// `GET`.
    pub fn get(&self, target: &str) -> io::Result<ApiResponse> {
        self.send("GET", target, None)
    }

    /// `PUT` with a JSON body.
    pub fn put(&self, target: &str, body: &Value) -> io::Result<ApiResponse> {
        self.send("PUT", target, Some(&body.to_string()))
    }

    /// `POST` without a body.
    pub fn post(&self, target: &str) -> io::Result<ApiResponse> {
        self.send("POST", target, None)
    }

    /// The device as JSON.
    pub fn device(&self) -> io::Result<Value> {
        Ok(self.get("/v1/device")?.json())
    }

    /// Asks the guest for another size.
    pub fn resize(&self, bytes: u64) -> io::Result<ApiResponse> {
        self.put("/v1/device/requested-size", &json!({ "requested_size": bytes }))
    }

    /// Starts or ends a migration.
    pub fn set_migration(&self, active: bool) -> io::Result<ApiResponse> {
        self.put("/v1/migration", &json!({ "active": active }))
    }

    /// Unplugs and discards everything.
    pub fn system_reset(&self) -> io::Result<ApiResponse> {
        self.post("/v1/device/system-reset")
    }

    /// Any method with any body, which is called JSON whatever it is.
    pub fn send(&self, method: &str, target: &str, body: Option<&str>) -> io::Result<ApiResponse> {
        let mut request =
            format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
        if let Some(body) = body {
            request +=
                &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
        } else if method != "GET" {
            request += "Content-Length: 0\r\n";
        }
        request += "\r\n";
        request += body.unwrap_or_default();
        self.send_raw(request.as_bytes())
    }

    /// Any bytes at all; reads whatever response comes back.
    pub fn send_raw(&self, bytes: &[u8]) -> io::Result<ApiResponse> {
        let mut stream = UnixStream::connect(&self.path)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.write_all(bytes)?;
        let mut reader = BufReader::new(stream);
        let (status, headers) = read_head(&mut reader)?;
        let find = |name| headers.iter().find(|(found, _)| found == name).map(|(_, value)| value);
        let mut body = Vec::new();
        if find("transfer-encoding").is_some() {
            while let Some(chunk) = read_chunk(&mut reader)? {
                body.extend(chunk);
            }
        } else if let Some(length) = find("content-length") {
            let length = length.parse().map_err(|_| invalid("content-length"))?;
            reader.take(length).read_to_end(&mut body)?;
        } else {
            reader.read_to_end(&mut body)?;
        }
        let text = String::from_utf8_lossy(&body).into_owned();
        Ok(ApiResponse { status, headers, text })
    }

    /// Subscribes to the events. Those that happen after this returns are seen.
    pub fn events(&self) -> io::Result<EventStream> {
        let mut stream = UnixStream::connect(&self.path)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.write_all(
            b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n",
        )?;
        let mut reader = BufReader::new(stream);
        let (status, headers) = read_head(&mut reader)?;
        if status != 200 {
            return Err(invalid("status of the event stream"));
        }
        let chunked = headers.iter().any(|(name, _)| name == "transfer-encoding");
        Ok(EventStream { reader, chunked, text: String::new() })
    }
}

/// A server-sent event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its name.
    pub name: String,
    /// Its data.
    pub data: String,
}

impl Event {
    /// The data as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.data).unwrap_or(Value::Null)
    }
}

/// A stream of events.
#[derive(Debug)]
pub struct EventStream {
    reader: BufReader<UnixStream>,
    chunked: bool,
    text: String,
}

impl EventStream {
    /// The next event; nothing when none comes in time or the stream has ended. Comments (signs of
    /// life) are left out.
    pub fn next(&mut self, timeout: Duration) -> io::Result<Option<Event>> {
        self.reader.get_ref().set_read_timeout(Some(timeout))?;
        loop {
            while let Some((block, rest)) = self.text.split_once("\n\n") {
                let event = parse_event(block);
                self.text = rest.to_owned();
                if event.is_some() {
                    return Ok(event);
                }
            }
            let bytes = if self.chunked {
                read_chunk(&mut self.reader)
            } else {
                read_some(&mut self.reader)
            };
            match bytes {
                Ok(Some(bytes)) => self.text += &String::from_utf8_lossy(&bytes),
                Ok(None) => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }
}

fn parse_event(block: &str) -> Option<Event> {
    let mut event = Event { name: String::from("message"), data: String::new() };
    let mut any = false;
    for line in block.lines() {
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => event.name = value.to_owned(),
            "data" if any => event.data = format!("{}\n{value}", event.data),
            "data" => event.data = value.to_owned(),
            _ => continue,
        }
        any = true;
    }
    any.then_some(event)
}

fn read_head(reader: &mut impl BufRead) -> io::Result<(u16, Vec<(String, String)>)> {
    let line = read_line(reader)?;
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or_else(|| invalid("status line"))?;
    let mut headers = Vec::new();
    loop {
        let line = read_line(reader)?;
        if line.is_empty() {
            return Ok((status, headers));
        }
        let (name, value) = line.split_once(':').ok_or_else(|| invalid("header"))?;
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
}

fn read_line(reader: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line.trim_end().to_owned())
}

/// A chunk of a body; nothing at its end.
fn read_chunk(reader: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let line = read_line(reader)?;
    let length = usize::from_str_radix(&line, 16).map_err(|_| invalid("chunk"))?;
    let mut bytes = vec![0; length + 2];
    reader.read_exact(&mut bytes)?;
    bytes.truncate(length);
    Ok((length != 0).then_some(bytes))
}

fn read_some(reader: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let bytes = reader.fill_buf()?.to_vec();
    reader.consume(bytes.len());
    Ok((!bytes.is_empty()).then_some(bytes))
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not HTTP: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_end_with_the_empty_one() {
        let mut bytes = b"5\r\nhello\r\n0\r\n\r\n".as_slice();
        assert_eq!(read_chunk(&mut bytes).unwrap().unwrap(), b"hello");
        assert_eq!(read_chunk(&mut bytes).unwrap(), None);
    }

    #[test]
    fn comment_is_no_event() {
        assert_eq!(parse_event(": still here"), None);
        let event = parse_event("event: migration\ndata: {\"active\":\ndata: true}").unwrap();
        assert_eq!(
            (event.name.as_str(), event.json()["active"].as_bool()),
            ("migration", Some(true))
        );
    }
}
