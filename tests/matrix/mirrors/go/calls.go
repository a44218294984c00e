// The client of an HTTP mirror on Go's runtime: bodies of all sizes, whole and in pieces.
package main

import (
	"bytes"
	"fmt"
	"io"
	"math/rand"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"
)

const clients, small = 4, 15

// dribbled gives a body in pieces, with pauses; its length is told to nobody.
func dribbled(data []byte, dice *rand.Rand) io.Reader {
	reader, writer := io.Pipe()
	go func() {
		for len(data) > 0 {
			size := 1 << dice.Intn(16)
			if size > len(data) {
				size = len(data)
			}
			writer.Write(data[:size])
			data = data[size:]
			time.Sleep(time.Duration(dice.Intn(3)/2) * time.Millisecond)
		}
		writer.Close()
	}()
	return reader
}

func ask(client *http.Client, method, path string, body io.Reader, wanted []byte) int {
	request, err := http.NewRequest(method, "http://"+os.Args[2]+":"+os.Args[3]+path, body)
	if err != nil {
		panic(err)
	}
	request.Host = "server" // the Service's name, by which the client's proxy routes
	response, err := client.Do(request)
	if err != nil {
		panic(err)
	}
	defer response.Body.Close()
	got, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != 200 {
		panic(fmt.Sprint(response.Status, err))
	}
	if !bytes.Equal(got, wanted) {
		panic(fmt.Sprintf("AssertionError: wanted %d bytes, got %d, which are others", len(wanted), len(got)))
	}
	return len(got)
}

func callOnce(seed int64, size int) int {
	dice := rand.New(rand.NewSource(seed))
	client := &http.Client{Transport: &http.Transport{MaxConnsPerHost: 1}, Timeout: time.Minute}
	made := func(size int) []byte {
		data := make([]byte, size)
		dice.Read(data)
		return data
	}
	moved := 0
	for n := 0; n < small; n++ {
		data := made(1 + dice.Intn(1<<dice.Intn(15)))
		moved += 2 * ask(client, "POST", "/echo", bytes.NewReader(data), data)
	}
	data := made(size / 8)
	moved += 2 * ask(client, "POST", "/echo", dribbled(data, dice), data)
	moved += ask(client, "GET", "/push?"+strconv.Itoa(size/2), nil, pattern(0, size/2))
	data = made(size / 2)
	return moved + 2*ask(client, "POST", "/echo", bytes.NewReader(data), data)
}

func callAll() {
	seed, _ := strconv.ParseInt(os.Args[4], 10, 64)
	size, _ := strconv.Atoi(os.Args[5])
	moved := make([]int, clients)
	var all sync.WaitGroup
	for n := range moved {
		all.Add(1)
		go func(n int) {
			defer all.Done()
			moved[n] = callOnce(seed*clients+int64(n), size)
		}(n)
	}
	all.Wait()
	sum := 0
	for _, each := range moved {
		sum += each
	}
	fmt.Printf("{\"bytes\": %d}\n", sum)
}
