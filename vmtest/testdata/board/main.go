// Board is what the tests put into container images: a message board.
//
//	board            serves it on the port of the environment's PORT
//	board check URL  tells by its exit code whether a board answers there
//
// GET / prints VERSION, then what was posted. POST / adds a line. Where PEER is
// set it keeps nothing and hands on to the board there.
package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"sync"
)

func main() {
	if len(os.Args) == 3 && os.Args[1] == "check" {
		resp, err := http.Get(os.Args[2])
		if err != nil || resp.StatusCode != http.StatusOK {
			os.Exit(1)
		}
		return
	}
	var handler http.Handler = http.HandlerFunc(board)
	if peer := os.Getenv("PEER"); peer != "" {
		u, err := url.Parse(peer)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		handler = httputil.NewSingleHostReverseProxy(u)
	}
	fmt.Fprintln(os.Stderr, http.ListenAndServe(":"+os.Getenv("PORT"), handler))
	os.Exit(1)
}

var mu sync.Mutex

func board(w http.ResponseWriter, r *http.Request) {
	mu.Lock()
	defer mu.Unlock()
	file, err := os.OpenFile(filepath.Join(os.Getenv("DATA"), "messages"), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o644)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer file.Close()
	if r.Method == http.MethodPost {
		if _, err := io.Copy(file, r.Body); err == nil {
			err = file.Sync()
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
		return
	}
	fmt.Fprintf(w, "board %s, password %s\n", os.Getenv("VERSION"), os.Getenv("PASSWORD"))
	io.Copy(w, file)
}
