//go:build e2e

package vmtest_test

import (
	"cmp"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"platter/vmtest/browser"
)

const chatDomain = "im.e2e.example"

// chatter is a user at the chat page.
type chatter struct {
	*browser.Browser
	t        *testing.T
	name     string
	evidence string // folder for screenshots
}

// evidence is the folder where pictures stay for people to look at.
func (r *rig) evidence() string {
	r.t.Helper()
	dir := cmp.Or(os.Getenv("PLATTER_ARTIFACTS"), filepath.Join(r.repo, "build/artifacts"))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		r.t.Fatal(err)
	}
	return dir
}

// chatter opens the chat page of a node. Its browser trusts the site's CA and
// finds the nodes only.
func (r *rig) chatter(name string, at *box, all []*box) *chatter {
	r.t.Helper()
	o := browser.Options{Command: []string{r.bin(), "lab", "exec", "--state", r.lab, "--"}, CA: filepath.Join(r.dir, "ca.pem"), Width: 1200, Height: 800, Scheme: "light"}
	for _, b := range all {
		o.Hosts = append(o.Hosts, b.addr)
	}
	return &chatter{browser.Open(r.t, "https://"+at.addr+"/", o), r.t, name, r.evidence()}
}

func (c *chatter) logIn() {
	c.t.Helper()
	c.fill(`input[name=jid]`, c.name)
	c.fill(`input[name=password]`, "Secret-12345")
	c.Press("Enter", 13)
}

func (c *chatter) loggedIn() {
	c.t.Helper()
	c.Await(`document.querySelector('converse-user-profile')`)
}

// fill enters text into a field.
func (c *chatter) fill(selector, text string) {
	c.t.Helper()
	c.Await(fmt.Sprintf(`document.querySelector(%q).getClientRects().length`, selector))
	// A dialog that is coming up takes the focus away, and does not go before it is there.
	c.Await(`document.getAnimations().every(a => a.playState !== 'running' || !a.effect.target.closest('.modal'))`)
	c.Await(fmt.Sprintf(`(document.querySelector(%q).focus(), document.activeElement === document.querySelector(%q))`, selector, selector))
	c.Type(text)
}

func (c *chatter) click(expr string) {
	c.t.Helper()
	c.Await(expr)
	c.Eval(expr + `.click()`)
}

// chat opens the chat with another user.
func (c *chatter) chat(with string) {
	c.t.Helper()
	c.click(fmt.Sprintf(`document.querySelector('a.open-chat[data-jid="%s@%s"]')`, with, chatDomain))
}

const room = "运维" // names are not only Latin

// say sends a message in the chat or the room that is open.
func (c *chatter) say(text string) {
	c.t.Helper()
	c.fill(`converse-chats textarea.chat-textarea`, text)
	c.Press("Enter", 13)
}

func (c *chatter) sees(text string) {
	c.t.Helper()
	c.Await(fmt.Sprintf(`[...document.querySelectorAll('.chat-msg__text')].some(m => m.getClientRects().length && m.innerText.includes(%q))`, text))
}

// seesPicture waits for a picture that has been loaded in its full size.
func (c *chatter) seesPicture(from *box) {
	c.t.Helper()
	c.Await(fmt.Sprintf(`[...document.querySelectorAll('img.chat-image')].some(i => i.src.startsWith('https://%s/upload/') && i.complete && i.naturalWidth === 320)`, from.addr))
}

// reconnecting is true while the page has lost its connection.
const reconnecting = `!document.querySelector('converse-user-profile')`

// show leaves a picture of the page.
func (c *chatter) show(what string) {
	c.t.Helper()
	file := filepath.Join(c.evidence, "web-"+what+".png")
	os.Remove(file)
	c.Screenshot(file)
	if info, err := os.Stat(file); err != nil || info.Size() < 5000 {
		c.t.Errorf("the picture %s is empty: %v", file, err)
	}
}

// TestStackWeb: two people chat in real browsers on the pages of two nodes. One of
// them goes on when the node is cut off, and no acknowledged message is lost.
func TestStackWeb(t *testing.T) {
	r, boxes := boxRack(t, 3)
	for _, b := range boxes {
		b.on()
	}
	r.await("all are ready", allReady, "node1", "node2", "node3")
	// What becomes of the service without its primary database is another test's.
	p := primary(t, boxes)
	slices.SortStableFunc(boxes, func(a, b *box) int {
		switch p {
		case a:
			return 1
		case b:
			return -1
		}
		return 0
	})
	timed := func(what string, f func()) {
		t.Helper()
		began := time.Now()
		f()
		t.Logf("%s: %s", what, time.Since(began).Round(10*time.Millisecond))
	}
	boxes[0].sh("for u in anna bert; do ejabberdctl register $u " + chatDomain + " Secret-12345; done")
	r.write("ca.pem", boxes[0].sh("cat /etc/nginx/platter/ca.pem")+"\n")
	r.write("notes.html", "<script>document.title = 'ran'</script>")
	picture(t, filepath.Join(r.dir, "picture.png"))

	// What people get before they have a browser that trusts the page.
	curl := func(args ...string) string {
		t.Helper()
		return r.inLab(append([]string{"curl", "-sS", "--cacert", filepath.Join(r.dir, "ca.pem"), "-i"}, args...)...)
	}
	for _, b := range boxes {
		for address, want := range map[string]string{
			"http://" + b.addr + "/help.html": "Location: https://" + b.addr + "/help.html",
			"https://" + b.addr + "/ca.pem":   r.read("ca.pem"),
			"https://" + b.addr + "/":         "content-security-policy: default-src 'none'; script-src 'self';",
		} {
			if got := curl(address); !strings.Contains(strings.ReplaceAll(got, "\r", ""), want) {
				t.Errorf("%s: no %q in\n%s", address, want, got)
			}
		}
	}

	anna, bert := r.chatter("anna", boxes[0], boxes), r.chatter("bert", boxes[1], boxes)
	anna.Await(`document.querySelector('converse-login-form').getAnimations({subtree: true}).every(a => a.playState === 'finished')`)
	anna.Await(`document.querySelector('converse-footer a[href="/help.html"]')`)
	anna.show("login")
	timed("logged in", func() { anna.logIn(); anna.loggedIn() })
	bert.logIn()
	bert.loggedIn()

	anna.click(`document.querySelector('a.add-contact')`)
	anna.fill(`converse-add-contact-modal input[name=jid]`, "bert@"+chatDomain)
	anna.Press("Enter", 13)
	bert.click(`document.querySelector('.accept-xmpp-request')`)
	bert.click(`document.querySelector('converse-modals .modal.show button[type=submit]')`)
	anna.Await(`document.querySelector('a.open-chat[data-jid^="bert@"] .contact-name--online, .contact-name--online')`)
	anna.chat("bert")
	bert.chat("anna")
	timed("a message from one page to the other", func() { anna.say("Hello Bert, 你好"); bert.sees("Hello Bert, 你好") })
	timed("a message back", func() { bert.say("Hello Anna"); anna.sees("Hello Anna") })

	bert.Choose(`input.fileupload`, filepath.Join(r.dir, "picture.png"))
	timed("a picture", func() { anna.seesPicture(boxes[1]) })
	anna.show("chat")

	// What was uploaded may not act as the page that it comes from.
	bert.Choose(`input.fileupload`, filepath.Join(r.dir, "notes.html"))
	link := `[...document.querySelectorAll('a[href$="/notes.html"]')].pop()`
	anna.Await(link)
	if got := curl(anna.Eval(link + `.href`).(string)); !strings.Contains(got, "sandbox") || !strings.Contains(got, "document.title") {
		t.Errorf("an uploaded page is served as:\n%s", got)
	}

	anna.enter()
	anna.say("Welcome to the room")
	anna.sees("Welcome to the room")
	bert.enter()
	bert.sees("Welcome to the room")
	timed("a message in a room", func() { bert.say("Thank you, 谢谢"); anna.sees("Thank you, 谢谢") })
	bert.show("room")

	for _, c := range []*chatter{anna, bert} {
		if got := c.Console(); len(got) > 0 {
			t.Errorf("%s's browser complains: %s", c.name, strings.Join(got, "\n"))
		}
	}

	// ejabberd of her node is away: the page goes on through another node's.
	anna.chat("bert")
	bert.chat("anna")
	timed("ejabberd of anna's node stops, its page goes on", func() {
		boxes[0].sh("systemctl stop ejabberd")
		anna.say("Still here")
		bert.sees("Still here")
	})
	anna.Choose(`input.fileupload`, filepath.Join(r.dir, "picture.png"))
	bert.Await(`document.querySelectorAll('img.chat-image').length === 2`)
	bert.seesPicture(boxes[1])
	anna.loggedIn()
	anna.show("resumed")
	boxes[0].sh("systemctl start ejabberd")

	// Her node is cut off while everybody writes. Its page goes on through another
	// node's, and what was said to her meanwhile is there.
	f := r.flow(boxes, boxes[1], 6)
	began := time.Now()
	since := func() time.Duration { return time.Since(began).Round(100 * time.Millisecond) }
	boxes[0].cable("down")
	bert.say("Where are you?")
	anna.Await(reconnecting)
	t.Logf("anna's node was cut off; her page knows it after %s", since())
	anna.show("cut-off")
	anna.loggedIn()
	anna.chat("bert")
	anna.sees("Where are you?")
	t.Logf("after %s she is logged in through another node and has what she missed", since())
	anna.say("Here I am")
	bert.sees("Here I am")
	anna.show("other-node")

	// Whoever opens another node's page gets in there with all that was said.
	began = time.Now()
	anna.Open("https://" + boxes[1].addr + "/")
	anna.logIn()
	anna.loggedIn()
	anna.chat("bert")
	for _, text := range []string{"Hello Bert, 你好", "Hello Anna", "Here I am"} {
		anna.sees(text)
	}
	anna.seesPicture(boxes[1])
	anna.say("I am back")
	bert.sees("I am back")
	t.Logf("%s after she opened another node's page she writes there, with her history", since())
	anna.show("moved")

	boxes[0].cable("up")
	r.whole("whole again with the node that was cut off")
	if res := f.end(); len(res.Lost) > 0 || res.Acked < 50 {
		t.Errorf("acknowledged and lost: %+v", res)
		t.Log(r.read("flow.log"))
	}

	rack := []string{boxes[0].addr, boxes[1].addr, boxes[2].addr}
	for _, c := range []*chatter{anna, bert} {
		hosts := c.Hosts()
		t.Logf("%s's browser asked %v", c.name, hosts)
		for _, h := range hosts {
			if !slices.Contains(rack, h) {
				t.Errorf("%s's browser asked %s, which is not of the rack", c.name, h)
			}
		}
		if len(hosts) == 0 {
			t.Errorf("no request of %s's browser was seen", c.name)
		}
	}
}

// enter goes into the room, which is made where there is none.
func (c *chatter) enter() {
	c.t.Helper()
	c.click(`document.querySelector('a.show-add-muc-modal')`)
	c.fill(`form.add-chatroom input[name=chatroom]`, room)
	c.Press("Enter", 13)
	c.Await(`document.querySelector('converse-muc textarea.chat-textarea') && !document.querySelector('.modal.show')`)
}

// picture makes one to be uploaded, 320 pixels wide.
func picture(t *testing.T, file string) {
	t.Helper()
	m := image.NewRGBA(image.Rect(0, 0, 320, 200))
	for x := range 320 {
		for y := range 200 {
			m.Set(x, y, color.RGBA{uint8(x * 255 / 320), uint8(y * 255 / 200), 160, 255})
		}
	}
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := png.Encode(f, m); err != nil {
		t.Fatal(err)
	}
}
