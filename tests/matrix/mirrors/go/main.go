// A mirror on Go's runtime; ../README.md says what it does. Usage: mirror tcp|http|copy PORT [greets] [CERTIFICATE KEY].
// `copy` is tcp whose echo is io.Copy, which uses splice(2). `mirror call HOST PORT SEED SIZE` calls another (calls.go).
package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"
)

var pieces = []int{1, 7, 100, 1460, 4096, 16384, 65536, 3}
var block = makeBlock()
var greets, splices bool

func makeBlock() []byte {
	made := make([]byte, 65521)
	x := uint32(1)
	for i := range made {
		x = x*1664525 + 1013904223
		made[i] = byte(x >> 24)
	}
	return made
}

func pattern(at, size int) []byte {
	start := at % len(block)
	return bytes.Repeat(block, 2+size/len(block))[start : start+size]
}

func push(to io.Writer, size int) {
	for sent, n := 0, 0; sent < size; n++ {
		piece := pieces[n%8]
		if piece > size-sent {
			piece = size - sent
		}
		if _, err := to.Write(pattern(sent, piece)); err != nil {
			return
		}
		sent += piece
		if n%8 == 7 {
			time.Sleep(time.Millisecond)
		}
	}
}

func take(from io.Reader) string {
	buffer := make([]byte, 65536)
	for taken, good := 0, 1; ; {
		n, err := from.Read(buffer)
		if !bytes.Equal(buffer[:n], pattern(taken, n)) {
			good = 0
		}
		taken += n
		if err != nil {
			return fmt.Sprintf("took %d %d\n", taken, good)
		}
	}
}

func echo(connection net.Conn, from *bufio.Reader) {
	if splices {
		// what is read already first: io.Copy splices from the socket itself
		early, _ := from.Peek(from.Buffered())
		connection.Write(early)
		io.Copy(connection, connection)
		return
	}
	buffer := make([]byte, 65536)
	for {
		n, err := from.Read(buffer)
		if _, wrong := connection.Write(buffer[:n]); wrong != nil || err != nil {
			return
		}
	}
}

func mirror(connection net.Conn) {
	defer connection.Close()
	if greets {
		io.WriteString(connection, "hello\n")
	}
	reader := bufio.NewReader(connection)
	var mode string
	var size int
	line, err := reader.ReadString('\n')
	if _, wrong := fmt.Sscan(line, &mode, &size); err != nil || wrong != nil {
		return
	}
	switch mode {
	case "@echo":
		echo(connection, reader)
	case "@push":
		push(connection, size)
	case "@take":
		io.WriteString(connection, "take\n")
		io.WriteString(connection, take(reader))
	}
	if half, ok := connection.(interface{ CloseWrite() error }); ok {
		half.CloseWrite()
	}
	io.Copy(io.Discard, reader)
}

func serveHTTP(port string) error {
	http.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		w.Write(body)
	})
	http.HandleFunc("/push", func(w http.ResponseWriter, r *http.Request) {
		size, _ := strconv.Atoi(r.URL.RawQuery)
		push(w, size)
	})
	return http.ListenAndServe("0.0.0.0:"+port, nil)
}

func main() {
	kind, port := os.Args[1], os.Args[2]
	if kind == "call" {
		callAll()
		return
	}
	if kind == "http" {
		log.Fatal(serveHTTP(port))
	}
	greets, splices = len(os.Args) == 4, kind == "copy"
	listener, err := net.Listen("tcp4", "0.0.0.0:"+port)
	if err != nil {
		log.Fatal(err)
	}
	if len(os.Args) == 5 {
		pair, err := tls.LoadX509KeyPair(os.Args[3], os.Args[4])
		if err != nil {
			log.Fatal(err)
		}
		listener = tls.NewListener(listener, &tls.Config{Certificates: []tls.Certificate{pair}})
	}
	for {
		connection, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go mirror(connection)
	}
}
